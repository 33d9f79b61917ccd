"""SeqIO tasks become batches: shapes, exact resumption, shares of hosts, and clear errors."""

import itertools

import numpy as np
import pytest
import tensorflow as tf
from conftest import load_config, shrink

from data_pipelines.reading import batches, tasks
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.stage import Stage


@pytest.fixture
def config(tiny_data):
    return read(tiny_data)


def read(tiny_data, **changes):
    values = shrink(load_config("demo")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    for key, value in changes.items():
        section, _, last = key.rpartition(".")
        (values[section] if section else values)[last] = value
    return parse(values)


def take(batches, n):
    return list(itertools.islice(batches, n))


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_batches_have_the_shapes_that_the_step_is_compiled_for(config):
    batch = take(batches.train_batches(config, 0), 1)[0]
    spec = Stage(config).abstract_batch
    assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
        k: (v.shape, v.dtype) for k, v in spec.items()
    }
    lengths = batch["text_mask"].sum(1)
    assert (lengths > 0).all() and len(set(lengths)) > 1
    assert not batch["text"][~batch["text_mask"]].any()
    assert all(np.unique(image).size > 1 for image in batch["image"])


def test_a_position_is_all_it_takes_to_go_on(config):
    # Across the end of the first epoch of 40 examples.
    straight = take(batches.train_batches(config, 0), 7)
    resumed = take(batches.train_batches(config, 3 * config.batch_size), 4)
    assert all(map(same, straight[3:], resumed))
    assert not same(straight[0], straight[5])


def test_hosts_hold_consecutive_rows_of_the_same_global_batches(config):
    whole = take(batches.train_batches(config, 0), 3)
    hosts = [take(batches.train_batches(config, 0, h, 4), 3) for h in range(4)]
    for i, batch in enumerate(whole):
        joined = {k: np.concatenate([h[i][k] for h in hosts]) for k in batch}
        assert same(joined, batch)


@pytest.mark.parametrize("crops", [{}, {"data.image_size": 32, "model.image_size": 16}])
def test_from_memory_come_the_batches_that_come_from_disk(tiny_data, crops):
    # The second share of three, from the middle of the first epoch into the second.
    crops = {**crops, "data.categories": ("Colors", "Conflicting", "Counting"), "batch_size": 6}
    disk, memory = (read(tiny_data, **crops, **{"data.in_memory": m}) for m in (False, True))
    found = [take(batches.train_batches(c, 12, 1, 3), 12) for c in (disk, memory)]
    assert all(map(same, *found))
    assert not same(found[0][0], found[0][1])


def test_more_than_the_memory_is_one_line(tiny_data, monkeypatch):
    monkeypatch.setattr(batches, "physical_memory", lambda: 2**10)
    with pytest.raises(UserError, match=r"in_memory is True, but 40 records take .* a quarter of"):
        batches.train_batches(read(tiny_data, **{"data.in_memory": True}), 0)


def test_an_epoch_is_the_permutation_that_tensorflow_has_for_its_number():
    source = tasks.RecordsSource("scenes/32", start=5)
    pairs = source.order(7, seed=3).take(100).as_numpy_iterator()
    for position, index in pairs:
        seed = [3, position // 7]
        assert index == tf.random.experimental.index_shuffle(position % 7, seed, 6)


def test_evaluation_batches_never_change_and_prompts_are_the_first_of_their_split(config):
    first, again = batches.eval_batches(config), batches.eval_batches(config)
    assert len(first) == config.eval_batches and all(map(same, first, again))
    rows = batches.examples(config, "heldout", 3)
    assert [set(r) for r in rows] == [
        {"caption", "category", "scene", "image", "text", "text_mask"}
    ] * 3
    assert rows[0]["caption"] == batches.examples(config, "heldout", 1)[0]["caption"]


def test_only_the_wanted_categories_are_read_in_an_order_of_their_own(config, tiny_data):
    wanted = read(tiny_data, **{"data.categories": ("Colors", "Counting")})
    every, some = (batches.examples(c, "train", 40) for c in (config, wanted))
    assert [r["caption"] for r in some] == [
        r["caption"] for r in every if r["category"] in ("Colors", "Counting")
    ]
    assert 8 < len(some) < len(every) == 40
    straight = take(batches.train_batches(wanted, 0), 6)
    resumed = take(batches.train_batches(wanted, 2 * wanted.batch_size), 4)
    assert all(map(same, straight[2:], resumed))
    seen = np.concatenate([batch["image"] for batch in straight])[: len(some)]
    assert sorted(i.tobytes() for i in seen) == sorted(r["image"].tobytes() for r in some)


def test_an_unknown_category_is_one_line(tiny_data):
    config = read(tiny_data, **{"data.categories": ("Colors", "Colours")})
    with pytest.raises(UserError, match=r"data\.categories has 'Colours'; scenes/32:train has: Co"):
        next(batches.train_batches(config, 0))


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
def test_misfits_are_one_line(tiny_data, changes, words):
    with pytest.raises(UserError) as e:
        batches.open_task(read(tiny_data, **changes))
    assert words in str(e.value) and "\n" not in str(e.value)


def test_an_image_smaller_than_the_model_is_one_line(tiny_data):
    config = read(tiny_data, **{"model.image_size": 64, "model.attention_resolutions": (16,)})
    with pytest.raises(UserError, match=r"smaller than config\.model\.image_size"):
        next(batches.train_batches(config, 0))


def test_an_unknown_split_is_one_line(config):
    with pytest.raises(UserError, match="has no split 'test'; it has: train, validation, heldout"):
        batches.examples(config, "test", 1)
