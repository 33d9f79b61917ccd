"""The recipes of docs/extending.md work as printed."""

import importlib.util
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, FakeEncoder
from networks import inputs

from imagen_jax.common.errors import UserError
from imagen_jax.diffusion import solvers
from imagen_jax.models import networks


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Imports the Python block of extending.md that contains a word, without running its main."""

    def load(word, **names):
        blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(), re.S)
        [block] = [b for b in blocks if word in b]
        path = tmp_path / "recipe.py"
        path.write_text(block)
        spec = importlib.util.spec_from_file_location("recipe", path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "recipe", module)
        vars(module).update(names)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_dataset_is_written(recipe, tmp_path):
    from data_pipelines.records import prepared, writing

    squares = recipe("class Squares").Squares(data_dir=str(tmp_path), encoder=FakeEncoder(), seed=0)
    writing.prepare(squares)
    info = prepared.dataset_info(str(tmp_path), "squares")
    assert info.num_examples == {"train": 96, "validation": 16}


def test_the_source_format_is_ingested_and_reports_damage(recipe, tmp_path, monkeypatch):
    import base64
    import json

    from making import encoded, ingest, picture, report, rows

    from data_pipelines.ingestion import sources

    monkeypatch.setitem(sources.KINDS, "embedded", recipe("def read_file").find)
    images = [base64.b64encode(encoded(picture(i))).decode() for i in range(3)]
    lines = [{"image": data, "caption": f"picture {i}"} for i, data in enumerate(images)]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"image": images[0]}]))
    folder = ingest(tmp_path / "data", f"embedded:{path}")
    found = {name: row["caption"].decode() for name, row in rows(folder).items()}
    assert found == {f"pairs/{i + 1:07d}": f"picture {i}" for i in range(3)}
    assert [skip["reason"] for skip in report(folder)["skipped"]] == ["missing caption"]
    path.write_text("{}\n")
    with pytest.raises(UserError, match=r"pairs\.jsonl: line 1 is damaged .* --skip_damaged"):
        ingest(tmp_path / "other", f"embedded:{path}")


def test_the_network_gives_zeros_at_the_start_and_checks_its_config(recipe, monkeypatch):
    r = recipe("class ConvNet(")
    entry = networks.Network(r.ConvNetConfig, r.ConvNet)
    monkeypatch.setitem(networks.NETWORKS, "convnet", entry)
    config = r.ConvNetConfig(image_size=8, low_res=4, text_dim=6, width=8, num_blocks=2)
    network = networks.build(config)
    z, log_snr, cond = inputs(config)
    out = jax.jit(network.apply)(network.init(jax.random.key(0)), z, log_snr, cond)
    np.testing.assert_array_equal(out, jnp.zeros_like(z))
    with pytest.raises(UserError, match=r"model\.width is 0"):
        r.ConvNetConfig(width=0)


def test_the_solver_equals_ddim(recipe):
    step = recipe("def euler_step", alpha_sigma=solvers.alpha_sigma).euler_step
    z, x_hat = np.random.default_rng(0).standard_normal((2, 2, 4, 4, 3), np.float32)
    _, z_s = step((), z, x_hat, jnp.float32(-2.0), jnp.float32(1.0), None)
    expected = solvers.ddim(z, x_hat, jnp.float32(-2.0), jnp.float32(1.0))
    np.testing.assert_allclose(z_s, expected, atol=1e-5)


def test_the_metric_has_a_figure_for_each_group(recipe):
    metric = recipe("def brightness").METRIC
    images = np.full((2, 4, 4, 3), [[[[10]]], [[[20]]]], np.uint8)
    figures = metric.measure(images, [{"category": "a"}, {"category": "b"}])
    assert figures["all"] == {"brightness": 15, "num": 2}
    assert metric.cell(figures["a"]) == "10"
