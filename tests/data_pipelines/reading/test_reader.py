"""Batches from SeqIO tasks: shapes, exact resumption, the hosts' shares, and clear errors."""

import dataclasses
import itertools
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import load_config, shrink

from data_pipelines.reading import check, reader
from data_pipelines.reading.order import Order
from data_pipelines.reading.reader import Reader
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.stage import Stage


@pytest.fixture
def config(tiny_data):
    return read(tiny_data)


def read(tiny_data, **changes):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (values[section] if section else values)[last] = value
    return parse(values)


def take(batches, n):
    return list(itertools.islice(batches, n))


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_batches_have_the_shapes_the_step_is_compiled_for(config):
    batch = take(Reader(config).train_batches(0), 1)[0]
    spec = Stage(config).abstract_batch
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in spec.items()
    }
    lengths = batch["text_mask"].sum(1)
    assert (lengths > 0).all() and len(set(lengths)) > 1
    assert not batch["text"][~batch["text_mask"]].any()
    assert all(np.unique(image).size > 1 for image in batch["image"])


def test_a_position_resumes_the_batches_exactly(config):
    # An epoch has 40 examples, so this crosses its end.
    straight = take(Reader(config).train_batches(0), 7)
    resumed = take(Reader(config).train_batches(3 * config.batch_size), 4)
    assert all(map(same, straight[3:], resumed))
    assert not same(straight[0], straight[5])


def test_hosts_get_consecutive_rows_of_the_same_global_batches(config):
    whole = take(Reader(config).train_batches(0), 3)
    hosts = [take(Reader(config).train_batches(0, h, 4), 3) for h in range(4)]
    for i, batch in enumerate(whole):
        joined = {k: np.concatenate([h[i][k] for h in hosts]) for k in batch}
        assert same(joined, batch)


@pytest.mark.parametrize("crops", [{}, {"data.image_size": 32, "model.image_size": 16}])
def test_batches_from_memory_equal_those_from_disk(tiny_data, crops):
    # The second of three shares, from the middle of the first epoch into the second.
    crops = {**crops, "data.categories": ("Colors", "Conflicting", "Counting"), "batch_size": 6}
    disk, memory = (read(tiny_data, **crops, **{"data.in_memory": m}) for m in (False, True))
    found = [take(Reader(c).train_batches(12, 1, 3), 12) for c in (disk, memory)]
    assert all(map(same, *found))
    assert not same(found[0][0], found[0][1])


def test_data_larger_than_memory_are_refused_in_one_line(tiny_data, monkeypatch):
    monkeypatch.setattr(reader, "physical_memory", lambda: 2**10)
    with pytest.raises(UserError, match=r"in_memory is True, but 40 records take .* a quarter of"):
        Reader(read(tiny_data, **{"data.in_memory": True})).train_batches(0)


def test_each_epoch_is_a_permutation_by_tensorflows_index_shuffle():
    positions = np.arange(5, 105)
    for position, index in zip(positions, Order(7, seed=3).index(positions), strict=True):
        seed = [3, position // 7]
        assert index == tf.random.experimental.index_shuffle(position % 7, seed, 6)


def test_evaluation_batches_and_prompts_repeat(config):
    first, again = Reader(config).eval_batches(), Reader(config).eval_batches()
    assert len(first) == config.eval_batches and all(map(same, first, again))
    rows = Reader(config).examples("heldout", 3)
    assert [set(r) for r in rows] == [
        {"id", "caption", "category", "scene", "image", "text", "text_mask"}
    ] * 3
    assert rows[0]["caption"] == Reader(config).examples("heldout", 1)[0]["caption"]


def test_categories_select_records_and_resume_exactly(config, tiny_data):
    wanted = read(tiny_data, **{"data.categories": ("Colors", "Counting")})
    every, some = (Reader(c).examples("train", 40) for c in (config, wanted))
    assert [r["caption"] for r in some] == [
        r["caption"] for r in every if r["category"] in ("Colors", "Counting")
    ]
    assert 8 < len(some) < len(every) == 40
    straight = take(Reader(wanted).train_batches(0), 6)
    resumed = take(Reader(wanted).train_batches(2 * wanted.batch_size), 4)
    assert all(map(same, straight[2:], resumed))
    seen = np.concatenate([batch["image"] for batch in straight])[: len(some)]
    assert sorted(i.tobytes() for i in seen) == sorted(r["image"].tobytes() for r in some)


def test_an_unknown_category_is_refused_in_one_line(tiny_data):
    config = read(tiny_data, **{"data.categories": ("Colors", "Colours")})
    with pytest.raises(UserError, match=r"data\.categories has 'Colours'; scenes/32:train has: Co"):
        next(Reader(config).train_batches(0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.task": "scene_32"}, "config.data.task is 'scene_32'; allowed: scenes_32"),
        ({"data.task": "scenes_64"}, "make it with: python -m data_pipelines.scenes"),
        ({"data.dir": "/nowhere"}, "/nowhere"),
        ({"text.dim": 16}, "config.text.dim is 16"),
        ({"text.encoder": "t5-v1_1-xxl"}, "config.text.encoder is 't5-v1_1-xxl'"),
        ({"text.max_tokens": 4}, "config.text.max_tokens is 4"),
    ],
)
def test_data_that_do_not_fit_the_config_are_refused_in_one_line(tiny_data, changes, words):
    with pytest.raises(UserError) as e:
        Reader(read(tiny_data, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_an_image_smaller_than_the_model_is_refused_in_one_line(tiny_data, monkeypatch):
    config = read(tiny_data, **{"model.image_size": 64, "model.attention_resolutions": (16,)})
    with pytest.raises(UserError, match=r"model\.image_size is 64; the images of .* are 32x32"):
        Reader(config)
    # If the metadata lack the size of the images, reading finds it.
    monkeypatch.setattr(check, "check_dataset", lambda config: None)
    with pytest.raises(UserError, match=r"image too small: 32x32, but config\.model\.image_size"):
        next(Reader(config).train_batches(0))


def test_an_unknown_split_is_refused_in_one_line(config):
    with pytest.raises(UserError, match="has no split 'test'; it has: train, validation, heldout"):
        Reader(config).examples("test", 1)


def as_folder(tmp_path, tiny_data):
    """The tiny scenes under the name of a user's folder, with their captions' categories."""
    shutil.copytree(f"{tiny_data}/scenes/32", tmp_path / "folder")
    return read(str(tmp_path), **{"data.task": "folder", "data.sample_split": "validation"})


def test_a_prepared_dataset_passes_the_check(tmp_path, tiny_data, config):
    check.check_prepared(config)
    check.check_prepared(as_folder(tmp_path, tiny_data))
    # A run with data.build draws its data itself.
    check.check_prepared(read(str(tmp_path / "none"), **{"data.build": True}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "has no dataset 'folder'; make it with: python -m data_pipelines.ingest --source=FOL"),
        ({"text.max_tokens": 64}, "--max_tokens=64"),
        (
            {"text.encoder": "/models/t5-v1_1-xxl"},
            "--encoder=/models/t5-v1_1-xxl --max_tokens=6 (docs/text.md says what --encoder takes)",
        ),
        ({"data.image_size": 512}, "--resolution=512"),
        ({"data.build": True}, "data.task is 'folder'; set --config.data.build=false"),
        ({"data.task": "photos"}, "config.data.task is 'photos'; allowed: scenes_32, "),
        ({"data.task": "scenes_64"}, "python -m data_pipelines.scenes --data_dir="),
        (
            {"data.task": "scenes_32", "data.build": True, "data.embeddings": "/no/store"},
            "data.embeddings=/no/store holds no store",
        ),
    ],
)
def test_the_check_reports_missing_data(tmp_path, changes, words):
    missing = read(str(tmp_path), **{"data.task": "folder", **changes})
    with pytest.raises(UserError) as e:
        check.check_prepared(missing)
    assert words in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data.categories": ("Colors",)}, "set --config.data.categories='()'; configs/folder.py"),
        ({"data.sample_split": "test"}, "has no split 'test'; it has: train, validation, heldout"),
        ({"text.dim": 16}, "config.text.dim is 16"),
    ],
)
def test_the_check_reports_a_dataset_that_does_not_fit(tmp_path, tiny_data, changes, words):
    config = as_folder(tmp_path, tiny_data)
    [(key, value)] = changes.items()
    section, name = key.split(".")
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    with pytest.raises(UserError) as e:
        check.check_prepared(dataclasses.replace(config, **{section: changed}))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_the_check_needs_no_tensorflow():
    code = (
        "import sys, data_pipelines.reading.check; print({'jax', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
