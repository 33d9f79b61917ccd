"""The scenes dataset: an index is the same scene at every resolution."""

import io

import numpy as np
import pytest
from encoders import ByteEncoder
from PIL import Image

from data_pipelines.reading import tasks
from data_pipelines.records import prepared, writing
from data_pipelines.scenes.builder import RESOLUTIONS, Scenes, scene_record
from data_pipelines.scenes.vocabulary import SPLITS
from imagen_jax.common.errors import UserError


class Encoder(ByteEncoder):
    max_tokens = 192


def scenes(data_dir, resolution=32, seed=0, **counts):
    return Scenes(
        data_dir=str(data_dir), resolution=resolution, counts=counts, seed=seed, encoder=Encoder()
    )


def test_an_index_is_the_same_scene_at_every_resolution():
    base = {"split": "train", "seed": 3, "encoder": Encoder()}
    made = [scene_record(5, **base, resolution=r) for r in (32, 64, 256)]
    assert len({record["scene"] for record in made}) == 1
    small, *larger = (Image.open(io.BytesIO(record["image"])) for record in made)
    for image in larger:
        shrunk = np.asarray(image.resize(small.size, Image.Resampling.BOX)).astype(int)
        assert np.abs(shrunk - np.asarray(small)).mean() < 4


def test_the_scene_depends_on_seed_split_and_index():
    base = {"split": "train", "seed": 0, "resolution": 32, "encoder": Encoder()}
    scene = scene_record(0, **base)["scene"]
    assert scene_record(0, **base)["scene"] == scene
    for other in ({"split": "validation"}, {"seed": 1}):
        assert scene_record(0, **{**base, **other})["scene"] != scene
    assert scene_record(1, **base)["scene"] != scene


def test_records_are_the_scenes_in_order(tmp_path):
    writing.prepare(scenes(tmp_path, train=20, validation=3, heldout=4))
    assert prepared.dataset_info(str(tmp_path), "scenes/32").num_examples == {
        "train": 20,
        "validation": 3,
        "heldout": 4,
    }
    rows = list(tasks.RecordsSource("scenes/32", str(tmp_path)).get_dataset("heldout", False))
    for i, row in enumerate(rows):
        expected = scene_record(i, split="heldout", seed=0, resolution=32, encoder=Encoder())
        assert row["id"].numpy().decode() == f"heldout-{i:06d}"
        assert row["scene"].numpy().decode() == expected["scene"]
        assert row["image"].shape == (32, 32, 3)


def test_draws_only_the_wanted_categories(tmp_path):
    args = dict(data_dir=str(tmp_path), resolution=32, seed=0, encoder=Encoder())
    writing.prepare(Scenes(**args, counts={"train": 30}, categories=("Colors", "Counting")))
    [row] = {r["category"] for r in _rows(tmp_path)} - {b"Colors"}
    assert row == b"Counting"
    with pytest.raises(UserError, match=r"no category 'Colour'; allowed: Colors, Counting"):
        Scenes(**args, counts={"train": 30}, categories=("Colour",))
    with pytest.raises(UserError, match="categories="):
        writing.prepare(Scenes(**args, counts={"train": 30}))


def _rows(path):
    source = tasks.RecordsSource("scenes/32", str(path))
    return source.get_dataset("train", False).as_numpy_iterator()


def test_a_split_without_scenes_is_omitted(tmp_path):
    writing.prepare(scenes(tmp_path, train=2, validation=0, heldout=1))
    info = prepared.dataset_info(str(tmp_path), "scenes/32")
    assert info.num_examples == {"train": 2, "heldout": 1}


def test_resolutions_are_separate_datasets(tmp_path):
    for resolution in (32, 64):
        writing.prepare(scenes(tmp_path, resolution, train=1))
    assert prepared.dataset_info(str(tmp_path), "scenes/64").num_examples == {"train": 1}


@pytest.mark.parametrize("resolution", RESOLUTIONS)
def test_each_resolution_has_a_task(resolution):
    assert f"scenes_{resolution}" in tasks.names()


def test_the_source_has_all_splits():
    assert set(SPLITS) <= set(tasks.RecordsSource("scenes/32").splits)


def test_skips_and_counts_captions_too_long_for_the_encoder(tmp_path):
    class Short(Encoder):
        max_tokens = 30

    encoder = Short()
    builder = Scenes(
        data_dir=str(tmp_path), resolution=32, counts={"train": 40}, seed=0, encoder=encoder
    )
    writing.prepare(builder)
    taken = prepared.dataset_info(str(tmp_path), "scenes/32").num_examples["train"]
    assert 0 < taken < 40 and len(builder.report["skipped"]) == 40 - taken
    rows = tasks.RecordsSource("scenes/32", str(tmp_path)).get_dataset("train", False)
    captions = [row["caption"].numpy().decode() for row in rows]
    assert len(captions) == taken and max(map(encoder.num_tokens, captions)) <= 30
