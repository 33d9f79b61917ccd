"""Reads slices of tensors from files; only the requested slice is in memory.

Files are read, not memory-mapped: the pages of a mapped file count as memory of this process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import BinaryIO, Protocol

import ml_dtypes
import numpy as np

from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError, first_line

_SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip


MOST_AXES = 16  # no tensor of a network has more, and NumPy allows 64


class StoredTensor(Protocol):
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def T(self) -> StoredTensor:
        """The tensor with its axes reversed. Reads nothing."""

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        """Reads a slice of the tensor; `index` has one slice of step 1 per axis."""


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A StoredTensor of plain numbers in a file. `offset` and `strides` are in bytes."""

    path: Path
    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def T(self) -> FileTensor:
        return dataclasses.replace(self, shape=self.shape[::-1], strides=self.strides[::-1])

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        ranges = [s.indices(n)[:2] for s, n in zip(index, self.shape, strict=True)]
        # Following the file's order makes each read as long as possible.
        order = sorted(range(len(self.shape)), key=lambda axis: -self.strides[axis])
        out = np.empty([ranges[axis][1] - ranges[axis][0] for axis in order], self.dtype)
        start = sum(r[0] * stride for r, stride in zip(ranges, self.strides, strict=True))
        unbuffered = {} if buckets.is_remote(self.path) else {"buffering": 0}
        with self.path.open("rb", **unbuffered) as file:
            _fill(file, out, self.offset + start, tuple(self.strides[axis] for axis in order))
        return out.transpose(np.argsort(order))


def _fill(file: BinaryIO, out: np.ndarray, offset: int, strides: tuple[int, ...]) -> None:
    """Fills the contiguous array `out` with numbers that are `strides` bytes apart in the file."""
    if all(n == 1 or a == b for n, a, b in zip(out.shape, out.strides, strides, strict=True)):
        left = memoryview(out.reshape(-1).view(np.uint8))
        file.seek(offset)
        while left:
            num_read = file.readinto(left)
            if not num_read:
                raise UserError(f"{file.name}: the file ends in the middle of a tensor")
            left = left[num_read:]
        return
    for row, part in enumerate(out):
        _fill(file, part, offset + row * strides[0], strides[1:])


def contiguous_strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Returns the strides in bytes of a row-major array."""
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read_safetensors(path: str | os.PathLike) -> dict[str, FileTensor]:
    """Returns the tensors of a .safetensors file by name. Reads the header only.

    Raises:
      UserError: the file cannot be opened, is cut short, or has a damaged header.
    """
    path = buckets.to_path(path)
    try:
        with buckets.as_os_errors(path), path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = buckets.size(path)
            if 8 + length > size:
                raise ValueError(f"the header has {length} bytes, the file only {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {
            name: _safetensor(path, 8 + length, size, name, **fields)
            for name, fields in header.items()
        }
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror})") from e
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: not safetensors, or damaged: {first_line(e)}") from e


def _safetensor(
    path: Path, start: int, size: int, name: str, dtype: str, shape: list, data_offsets: list
) -> FileTensor:
    if dtype not in _SAFETENSORS_DTYPES:
        known = ", ".join(_SAFETENSORS_DTYPES)
        raise ValueError(f"tensor {name!r} has dtype {dtype!r}; supported: {known}")
    numpy_dtype = np.dtype(_SAFETENSORS_DTYPES[dtype])
    begin, end = data_offsets
    whole = [type(n) is int and n >= 0 for n in (*shape, begin, end)]
    if not isinstance(shape, list) or not all(whole) or len(shape) > MOST_AXES:
        raise ValueError(f"tensor {name!r} has shape {shape!r:.200}")
    if not 0 <= begin <= end <= size - start:
        raise ValueError(f"tensor {name!r} is outside the file's {size} bytes")
    if math.prod(shape) * numpy_dtype.itemsize != end - begin:
        raise ValueError(f"tensor {name!r} of shape {shape} has {end - begin} bytes")
    strides = contiguous_strides(tuple(shape), numpy_dtype.itemsize)
    return FileTensor(path, start + begin, numpy_dtype, tuple(shape), strides)
