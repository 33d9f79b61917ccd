"""Data in a bucket: fsspec's memory file system in place of s3://, without rename or append."""

import fsspec
import numpy as np
import pytest
from conftest import load_config, shrink
from datasets import record, write, write_store
from etils import epath
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem

from data_pipelines.reading.reader import Reader
from data_pipelines.records import tars
from data_pipelines.records.source import Bad, open_split
from imagen_jax.common.files import replacing, write_text
from imagen_jax.config import parse


class Bucket(MemoryFileSystem):
    """s3:// in memory. Objects can be neither renamed nor appended to."""

    protocol = "s3"
    store: dict = {}  # noqa: RUF012 (as in the base class)
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("s3://").strip("/")

    def mv(self, *args, **kwargs):
        raise OSError("a bucket has no rename")

    def _open(self, path, mode="rb", **kwargs):
        if "a" in mode:
            raise OSError("a bucket has no append")
        return super()._open(path, mode, **kwargs)


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("s3", Bucket, clobber=True)
    monkeypatch.setattr(gpath, "_is_tf_installed", lambda: False)
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    yield "s3://bucket"
    Bucket.store.clear()


def upload(folder, to):
    for path in folder.rglob("*"):
        if path.is_file():
            fsspec.filesystem("s3").pipe(f"{to}/{path.relative_to(folder)}", path.read_bytes())


def batches(data_dir, store, **changes):
    values = shrink(load_config("demo", "unet")).to_dict()
    values.update(eval_every=0, sample_every=0)
    values["data"].update(dir=str(data_dir), build=False, task="first", embeddings=str(store))
    values["data"].update(changes)
    reader = Reader(parse(values)).train_batches(8)
    found = [next(reader) for _ in range(3)]
    reader.close()
    return found


@pytest.mark.parametrize("window", [0, 16])
def test_batches_from_a_bucket_equal_those_from_a_disk(tmp_path, bucket, window):
    write(tmp_path / "data", "first", [record(i) for i in range(40)], offsets=window == 0)
    write_store(tmp_path / "store", [f"r {i}" for i in range(40)])
    upload(tmp_path, bucket)
    local = batches(tmp_path / "data", tmp_path / "store", shuffle_window=window)
    remote = batches(f"{bucket}/data", f"{bucket}/store", shuffle_window=window)
    for a, b in zip(local, remote, strict=True):
        for key, values in a.items():
            np.testing.assert_array_equal(b[key], values)


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
