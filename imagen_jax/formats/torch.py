"""Reads PyTorch's .bin files without PyTorch and without executing arbitrary pickles.

Since PyTorch 1.6 a .bin file is a zip: data.pkl describes the tensors, and data/KEY holds the
numbers of one storage, uncompressed. Older files are five pickles followed by the numbers. A pickle
can call any function by name; this reader allows only those that rebuild a tensor.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from imagen_jax.common.errors import UserError, first_line
from imagen_jax.formats.tensors import MOST_AXES, FileTensor

_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16", "LongStorage": "int64", "IntStorage": "int32",
    "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class _Storage(NamedTuple):
    key: str
    dtype: str


class _Tensor(NamedTuple):
    """A tensor as a pickle describes it. Offset and strides count elements of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Callable:
    """Wrapper of a function that keeps a pickle from setting attributes on it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable):
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError("it sets an attribute of a function")

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Callable(
        lambda storage, offset, shape, strides, *_: _Tensor(storage, offset, shape, strides)
    ),
    "torch._utils._rebuild_parameter": _Callable(lambda tensor, *_: tensor),
    **{f"torch.{name}": dtype for name, dtype in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise UserError(f"it asks to load {module}.{name}; only plain tensors are read")
        return _ALLOWED[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, *_ = pid
        if kind != "storage" or dtype not in _STORAGES.values() or not isinstance(key, str):
            raise pickle.UnpicklingError(f"not a storage: {pid!r}")
        return _Storage(key, dtype)


def read_torch(path: str | os.PathLike) -> dict[str, FileTensor]:
    """Returns the tensors of a state dict saved by torch.save, by name. Reads no numbers.

    Raises:
      UserError: the file cannot be opened, is damaged, or asks for anything other than tensors.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            state, starts = _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
        size = path.stat().st_size
        return {
            name: _file_tensor(path, size, starts, tensor)
            for name, tensor in state.items()
            if isinstance(tensor, _Tensor)
        }
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except UserError as e:
        raise UserError(f"{path}: unsafe pickle refused: {e}") from e
    except Exception as e:  # a damaged pickle raises nearly anything
        raise UserError(
            f"{path}: not a state dict saved by torch, or damaged: {first_line(e)}"
        ) from e


def _read_zip(file: BinaryIO) -> tuple[dict, dict[str, int]]:
    """Returns the pickled state dict and the byte offset of each storage."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        if members["data.pkl"].compress_type != zipfile.ZIP_STORED:
            raise ValueError("data.pkl is compressed")
        state = _Unpickler(archive.open(members["data.pkl"])).load()
    starts = {}
    for name, info in members.items():
        if name.startswith("data/"):
            if info.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{info.filename} is compressed")
            file.seek(info.header_offset + 26)
            len_name, len_extra = struct.unpack("<HH", file.read(4))
            starts[name.removeprefix("data/")] = info.header_offset + 30 + len_name + len_extra
    return state, starts


def _read_legacy(file: BinaryIO) -> tuple[dict, dict[str, int]]:
    """Returns the same as `_read_zip`, for files from before PyTorch 1.6."""
    file.seek(0)
    if _Unpickler(file).load() != _LEGACY_MAGIC:
        raise ValueError("no magic number")
    _version, _system = _Unpickler(file).load(), _Unpickler(file).load()
    state, starts = _Unpickler(file).load(), {}
    itemsizes = {
        tensor.storage.key: np.dtype(tensor.storage.dtype).itemsize
        for tensor in state.values()
        if isinstance(tensor, _Tensor)
    }
    for key in _Unpickler(file).load():
        (num_elements,) = struct.unpack("<q", file.read(8))
        starts[key] = file.tell()
        file.seek(num_elements * itemsizes[key], os.SEEK_CUR)
    return state, starts


def _file_tensor(path: Path, size: int, starts: dict[str, int], tensor: _Tensor) -> FileTensor:
    dtype = np.dtype(tensor.storage.dtype)  # importing ml_dtypes adds "bfloat16"
    numbers = (tensor.offset, *tensor.shape, *tensor.strides)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(tensor.shape) > MOST_AXES:
        raise ValueError(f"a tensor has shape {tensor.shape!r:.200}")
    # A stride of 0 repeats numbers, so that a small file could fill the memory.
    if math.prod(tensor.shape) * dtype.itemsize > size:
        raise ValueError(f"a tensor of shape {tensor.shape} is larger than the file")
    strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
    offset = starts[tensor.storage.key] + tensor.offset * dtype.itemsize
    last = [(n - 1) * stride for n, stride in zip(tensor.shape, strides, strict=True)]
    if math.prod(tensor.shape) and (
        min(offset, *strides, 0) < 0 or offset + sum(last) + dtype.itemsize > size
    ):
        raise ValueError(f"a tensor of shape {tensor.shape} is outside the file")
    return FileTensor(path, offset, dtype, tuple(tensor.shape), strides)
