"""The model card repeats what the dataset says about itself."""

import dataclasses

from conftest import load_config, shrink_transformer
from making import ingest, write_tars

from imagen_jax import export
from imagen_jax.config import parse


def test_the_card_has_the_counts_and_the_known_risks_of_the_dataset(tmp_path):
    write_tars(tmp_path / "tars", 1, 12)
    folder = ingest(tmp_path / "data", tmp_path / "tars")
    config = parse(shrink_transformer(load_config("demo")))
    data = dataclasses.replace(config.data, task="folder", dir=str(tmp_path / "data"), build=False)
    found = export.describe_data(dataclasses.replace(config, data=data))
    assert ("dataset", "folder") in found.rows and ("train records", "12") in found.rows
    assert ("date", "2026-01-02") in found.rows
    assert any(risk.startswith("The dataset may have near duplicates") for risk in found.risks)
    (folder / "manifest.json").write_text("{")
    damaged = export.describe_data(dataclasses.replace(config, data=data))
    assert ("", f"{folder}/manifest.json: not valid JSON") in [
        (key, value.partition(" (")[0]) for key, value in damaged.rows
    ]
