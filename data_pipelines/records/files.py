"""Reads byte ranges and arrays of local files, and of remote ones such as gs://bucket/file."""

from __future__ import annotations

import functools
import hashlib
import io
import os
import tempfile
import threading

import numpy as np
from etils import epath

from imagen_jax.common.errors import first_line

# numpy parses a file's header with `ast`, whose recursion counter Python 3.11 shares among threads:
# two that parse at the same moment can end in a SystemError.
_PARSING = threading.Lock()

# Open files and arrays to keep. A record costs one system call while its file is among them.
_KEPT = 256


class Files:
    """A cache of open files and memory-mapped arrays. Threads may share it.

    Attributes:
      reads: number of ranges read so far.
      bytes: their bytes.
    """

    def __init__(self):
        self.reads = self.bytes = 0
        self._open = functools.lru_cache(_KEPT)(_LocalFile)
        self.array = functools.lru_cache(_KEPT)(load_array)

    def read(self, path: str, start: int, size: int) -> bytes:
        """Returns the bytes from `start` on; fewer than `size` if the file ends before.

        Raises:
          OSError: the file cannot be read.
        """
        self.reads, self.bytes = self.reads + 1, self.bytes + size
        if "://" in path:
            return _read_remote(path, start, size)
        file = self._open(path)  # held, or a file that is not in the cache would close first
        # Bounded, because a damaged index can ask for anything.
        size = min(size, file.size - start)
        return os.pread(file.descriptor, size, start) if size > 0 else b""


class _LocalFile:
    """An open file, closed when nobody holds it: a thread may still read one that was evicted."""

    def __init__(self, path: str):
        self.descriptor = -1
        self.descriptor = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self):
        if self.descriptor >= 0:
            os.close(self.descriptor)


def _read_remote(path: str, start: int = 0, size: int | None = None) -> bytes:
    import fsspec

    end = None if size is None else start + size
    try:
        system, name = fsspec.core.url_to_fs(path)
    except ImportError:  # without gcsfs, TensorFlow reads gs://
        import tensorflow as tf

        try:
            with tf.io.gfile.GFile(path, "rb") as file:
                file.seek(start)
                return file.read(-1 if size is None else size)
        except tf.errors.OpError as e:
            raise OSError(e.message) from e
    return system.cat_file(name, start=start, end=end)  # one request; a file would read ahead


def load_array(path: str) -> np.ndarray:
    """Opens a .npy file without reading it: the operating system pages in what is used.

    A remote file is first copied to the folder for temporary files, once per machine.

    Raises:
      OSError, ValueError: it cannot be read, or is not an array.
    """
    if "://" not in path:
        return _open_array(path)
    data = _read_remote(path)
    name = hashlib.sha256(data).hexdigest()
    copy = epath.Path(tempfile.gettempdir()) / f"imagen_jax_{os.getuid()}_{name}.npy"
    if not copy.exists():
        with _PARSING:
            np.load(io.BytesIO(data), allow_pickle=False)  # refuse what is no array
        from imagen_jax.common.files import replacing

        with replacing(copy) as temporary:
            temporary.write_bytes(data)
    return _open_array(copy)


def _open_array(path: str | os.PathLike) -> np.ndarray:
    try:
        with _PARSING:
            return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as e:  # a damaged header makes numpy raise nearly anything
        raise ValueError(f"{path}: not an array ({first_line(e)})") from e
