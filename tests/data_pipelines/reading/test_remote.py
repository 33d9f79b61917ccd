"""Data in a bucket: in memory, without rename or append, and from a server by HTTP."""

import fsspec
import numpy as np
import pytest
from conftest import load_config, shrink
from datasets import record, write, write_store
from etils import epath
from fake_buckets import in_memory, serving, upload

from data_pipelines.embeddings.store import open_store
from data_pipelines.ingestion import sources
from data_pipelines.ingestion.items import Columns
from data_pipelines.reading.order import Order
from data_pipelines.reading.reader import Reader
from data_pipelines.records import prepared, tars
from data_pipelines.records.opening import open_split
from data_pipelines.records.source import Bad
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import replacing, write_text
from imagen_jax.config import parse


@pytest.fixture
def bucket():
    with in_memory() as path:
        yield path


def batches(data_dir, store, **changes):
    values = shrink(load_config("demo", "unet")).to_dict()
    values.update(eval_every=0, sample_every=0)
    values["data"].update(dir=str(data_dir), build=False, task="first", embeddings=str(store))
    values["data"].update(changes)
    reader = Reader(parse(values)).train_batches(8)
    found = [next(reader) for _ in range(3)]
    reader.close()
    return found


@pytest.mark.parametrize("kind", [in_memory, serving])
@pytest.mark.parametrize("window", [0, 16])
def test_batches_from_a_bucket_equal_those_from_a_disk(tmp_path, kind, window):
    write(tmp_path / "data", "first", [record(i) for i in range(40)], offsets=window == 0)
    write_store(tmp_path / "store", [f"r {i}" for i in range(40)])
    local = batches(tmp_path / "data", tmp_path / "store", shuffle_window=window)
    with kind() as bucket:
        upload(tmp_path, bucket)
        remote = batches(f"{bucket}/data", f"{bucket}/store", shuffle_window=window)
    for a, b in zip(local, remote, strict=True):
        for key, values in a.items():
            np.testing.assert_array_equal(b[key], values)


def test_a_window_is_one_request_for_each_run_of_16_records(tmp_path):
    """Counts what the server is asked for: ranges of records, not files and not single records."""
    write(tmp_path / "data", "first", [record(i) for i in range(96)], shard=48)
    with serving() as bucket:
        import gcsfs

        upload(tmp_path, bucket)
        asked = []

        class Counting(gcsfs.GCSFileSystem):
            async def _cat_file(self, path, start=None, end=None, **kwargs):
                found = await super()._cat_file(path, start=start, end=end, **kwargs)
                asked.append((path.rpartition("/")[2], len(found)))
                return found

        fsspec.register_implementation("gs", Counting, clobber=True)
        try:
            source = open_split(f"{bucket}/data", "first", "train")
            order = Order(len(source), seed=0, window=32)
            runs = list(dict.fromkeys((order.index(np.arange(96)) // 16).tolist()))
            found = [r for run in runs for r in source.read(16 * run, 16 * run + 16)]
        finally:
            fsspec.register_implementation("gs", gcsfs.GCSFileSystem, clobber=True)
    assert sorted(int(r.id[1:]) for r in found) == list(range(96))
    ranges = [size for name, size in asked if not name.endswith(".npy")]
    assert len(ranges) == 6 and len(asked) - len(ranges) == 2  # an index for each file
    files = [len(path.read_bytes()) for path in tmp_path.rglob("first-train*-of-00002")]
    assert sum(ranges) == sum(files)


def test_tars_in_a_bucket_are_indexed_and_read_there(tmp_path, bucket):
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in (("a.png", record(0)["image"]), ("a.txt", b"words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    fsspec.filesystem("s3").pipe(f"{bucket}/tars/x.tar", buffer.getvalue())
    folder = epath.Path(f"{bucket}/data/laion")
    indexed = tars.index_tar(f"{bucket}/tars/x.tar", folder)
    tars.write_tars(folder, [indexed], 0)
    [found] = open_split(f"{bucket}/data", "laion", "train").read(0, 1)
    assert not isinstance(found, Bad) and found.captions == ("words",)
    assert found.image == record(0)["image"]


def test_a_file_in_a_bucket_appears_complete_or_not_at_all(bucket):
    path = epath.Path(f"{bucket}/folder/file.txt")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert not path.exists()
    write_text(path, "whole")
    assert path.read_text() == "whole"


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("hdfs://host/x", "hdfs://host/x: hdfs:// is not read; use a folder, gs:// or s3://"),
        ("s3://bucket/x", "s3://bucket/x needs s3fs; install it with: pip install s3fs"),
    ],
)
def test_a_store_that_cannot_be_read_is_refused_in_one_line(path, words, monkeypatch):
    def missing(scheme):
        raise ImportError(scheme)

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    for call in (
        lambda: prepared.exists(path, "folder"),
        lambda: prepared.find(path, "folder"),
        lambda: open_store(path),
        lambda: sources.find(path, Columns(), 8),
    ):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value) == words
