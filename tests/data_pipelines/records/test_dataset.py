"""Records: reading returns what was written, in the computed order."""

import hashlib
import io
import itertools
import json
import os

import ml_dtypes
import numpy as np
import pytest
import seqio
from encoders import ByteEncoder
from PIL import Image

from data_pipelines.reading import tasks
from data_pipelines.records import dataset, prepared, writing
from imagen_jax.common.errors import UserError


class Toy(dataset.RecordsBuilder, skip_registration=True):
    """Makes n images of one color, named by their numbers; skips those in `bad`."""

    name = "emoji"  # a registered task reads it

    def __init__(self, data_dir, n=100, seed=0, encoder=None, bad=(), load=None):
        def make(i):
            if i in bad:
                return dataset.Skip(str(i), "bad number")
            image = np.full((8, 9, 3), [i, seed, 7], np.uint8)
            return {
                "id": f"n{i}",
                "image": dataset.png_bytes(image),
                "caption": f"number {i}",
                "category": "",
                "scene": "",
            }

        super().__init__(
            data_dir=str(data_dir),
            splits=lambda: {
                "train": dataset.Split(range(n), load or make),
                "validation": dataset.Split(range(7), make),
            },
            encoder=encoder or ByteEncoder(),
            settings={"n": n, "seed": seed},
        )


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "SHARD", 32)  # several files
        writing.prepare(Toy(path))
    return str(path)


def ids(data_dir, count=None, *, shuffle=True, seed=0, shard=0, num_shards=1, **at):
    task = seqio.get_mixture_or_task("emoji")
    dataset = task.replace(source=task.source.at(data_dir=data_dir, **at)).get_dataset(
        split="train",
        shuffle=shuffle,
        seed=seed,
        shard_info=seqio.ShardInfo(shard, num_shards),
        num_epochs=1,
        try_in_mem_cache=False,
    )
    rows = dataset.as_numpy_iterator() if count is None else dataset.take(count).as_numpy_iterator()
    return [int(row["id"][1:]) for row in rows]


def test_reading_returns_what_was_written(data_dir):
    task = seqio.get_mixture_or_task("emoji")
    task = task.replace(source=task.source.at(data_dir=data_dir))
    dataset = task.get_dataset(split="validation", shuffle=False, try_in_mem_cache=False)
    rows = list(dataset.as_numpy_iterator())
    assert [row["id"] for row in rows] == [b"n%d" % i for i in range(7)]
    assert rows[3].keys() == {"id", "image", "caption", "category", "scene", "text_embeddings"} | {
        "position"
    }
    assert [row["position"] for row in rows] == list(range(7))
    assert rows[3]["caption"] == b"number 3"
    np.testing.assert_array_equal(rows[3]["image"], np.full((8, 9, 3), [3, 0, 7], np.uint8))
    embeddings = rows[3]["text_embeddings"]
    assert embeddings.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(embeddings, ByteEncoder().embed("number 3"))


def test_reading_in_order_is_one_pass(data_dir):
    assert ids(data_dir, shuffle=False) == list(range(100))
    assert ids(data_dir, shuffle=False, start=97) == [97, 98, 99]


def test_each_epoch_has_its_own_permutation(data_dir):
    stream = ids(data_dir, 300)
    epochs = [stream[:100], stream[100:200], stream[200:]]
    assert all(sorted(epoch) == list(range(100)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert stream == ids(data_dir, 300)
    assert stream[:100] != ids(data_dir, 100, seed=1)


@pytest.mark.parametrize("start", [1, 42, 100, 250])
def test_a_start_position_resumes_the_stream(data_dir, start):
    assert ids(data_dir, 300)[start:] == ids(data_dir, 300 - start, start=start)


@pytest.mark.parametrize("num_shards, block", [(3, 1), (2, 5)])
@pytest.mark.parametrize("start", [0, 37])
def test_shards_together_read_the_stream_of_one_reader(data_dir, num_shards, block, start):
    each = 4 * block
    parts = [
        ids(data_dir, each, shard=i, num_shards=num_shards, block=block, start=start)
        for i in range(num_shards)
    ]
    by_block = np.array(parts).reshape(num_shards, -1, block).swapaxes(0, 1).ravel()
    assert by_block.tolist() == ids(data_dir, each * num_shards, start=start)


def test_shards_of_an_ordered_pass_read_each_record_once(data_dir):
    parts = [ids(data_dir, shuffle=False, shard=i, num_shards=3) for i in range(3)]
    assert sorted(itertools.chain(*parts)) == list(range(100))


def test_info_has_the_sizes_of_splits_and_the_encoder(data_dir):
    info = prepared.dataset_info(data_dir, "emoji")
    assert info.num_examples == {"train": 100, "validation": 7}
    assert info.text_identity == ByteEncoder().identity


@pytest.mark.parametrize("name", tasks.names())
def test_the_error_for_a_missing_dataset_has_the_command_to_make_it(tmp_path, name):
    source = seqio.get_mixture_or_task(name).source.at(data_dir=str(tmp_path))
    with pytest.raises(UserError, match="python -m data_pipelines") as error:
        source.get_dataset("train")
    assert f"data.dir={tmp_path}" in str(error.value) and repr(source.name) in str(error.value)


def digests(path):
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in path.glob("*-*")}


def test_preparing_twice_gives_the_same_bytes(tmp_path):
    first, second = (writing.prepare(Toy(tmp_path / name)) for name in "ab")
    assert digests(first) == digests(second) and len(digests(first)) == 4


def test_preparing_again_reuses_the_dataset_or_needs_overwrite(tmp_path, capsys):
    path = writing.prepare(Toy(tmp_path))
    before = digests(path)
    assert writing.prepare(Toy(tmp_path)) == path
    assert "already prepared" in capsys.readouterr().err

    changed = Toy(tmp_path, n=50, encoder=ByteEncoder("other"))
    with pytest.raises(UserError, match="--overwrite") as error:
        writing.prepare(changed)
    assert "n=100 (now 50); encoder=fake (now other)" in str(error.value)
    assert digests(path) == before

    writing.prepare(changed, overwrite=True)
    info = prepared.dataset_info(str(tmp_path), "emoji")
    assert info.num_examples["train"] == 50 and info.text_identity["encoder"] == "other"
    with pytest.raises(UserError, match="n=50"):
        writing.prepare(Toy(tmp_path))


def test_a_failure_keeps_the_old_dataset(tmp_path):
    path = writing.prepare(Toy(tmp_path))
    before = digests(path)

    def broken(i):
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        writing.prepare(Toy(tmp_path, n=50, load=broken), overwrite=True)
    assert digests(path) == before and os.listdir(path.parent) == [path.name]


def test_skipped_candidates_are_counted_and_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "SHARD", 4)
    # Skips all of the second file, the first of the third, and half of the validation split.
    path = writing.prepare(Toy(tmp_path, n=10, bad={4, 5, 6, 7, 8}))
    assert ids(str(tmp_path), shuffle=False) == [0, 1, 2, 3, 9]
    assert sorted(ids(str(tmp_path), 5)) == [0, 1, 2, 3, 9]
    report = json.loads((path / dataset.REPORT).read_text())
    assert report["records"] == {"train": 5, "validation": 4}
    skipped = [entry["name"] for entry in report["skipped"]]
    assert sorted(skipped) == sorted("45678456")
    assert "skipped 8: bad number 8" in capsys.readouterr().err


def test_no_usable_candidate_is_an_error_and_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="no usable example for emoji: bad number 17"):
        writing.prepare(Toy(tmp_path, n=10, bad=range(10)))
    assert list((tmp_path / "emoji").iterdir()) == []


def test_png_is_lossless():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    np.testing.assert_array_equal(
        np.asarray(Image.open(io.BytesIO(dataset.png_bytes(image)))), image
    )
