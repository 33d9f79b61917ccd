"""Reads T5 checkpoints in T5X's format: a msgpack index, and a zarr array per large tensor.

The index is a file named `checkpoint` that holds the train state as nested maps. A leaf is either
the array itself or a reference to a folder such as `target.encoder.layers_0.attention.key.kernel`.
There is no config. The shapes determine everything in which published T5 checkpoints differ.

T5X has two implementations of T5:
- `t5` stores each layer separately, as in the example above.
- `scalable_t5`, used for umT5, scans over layers. It stacks all layers on axis 1 of one array, such
  as `target.encoder.encoder.attention.key.kernel`. Its attention projections have an extra axis for
  the heads, and each layer has its own position biases.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from flax import serialization, traverse_util

from imagen_jax.common.errors import UserError, first_line
from imagen_jax.common.files import read_json
from imagen_jax.formats.tensors import MOST_AXES, StoredTensor
from imagen_jax.text.families import MOST_LAYERS, namer
from imagen_jax.text.loading import Checkpoint
from imagen_jax.text.t5 import T5Config, T5Encoder

INDEX_FILE = "checkpoint"
_CACHE_BYTES = 2**28
# Deflate, zarr's usual compression, makes no more than this of a byte.
_MOST_COMPRESSION = 1032
_BYT5_VOCAB_SIZE = 384  # no other vocabulary has this size

_NAMES = {
    "embed": "token_embedder",
    "relative_bias.table": "encoder.relpos_bias",
    "blocks.*.relative_bias.table": "encoder.layers_*.relpos_bias",
    "blocks.*.attention_norm": "encoder.layers_*.pre_attention_layer_norm",
    "blocks.*.attention.query": "encoder.layers_*.attention.query",
    "blocks.*.attention.key": "encoder.layers_*.attention.key",
    "blocks.*.attention.value": "encoder.layers_*.attention.value",
    "blocks.*.attention.out": "encoder.layers_*.attention.out",
    "blocks.*.mlp_norm": "encoder.layers_*.pre_mlp_layer_norm",
    "blocks.*.mlp.gate": "encoder.layers_*.mlp.wi_0",
    "blocks.*.mlp.up": "encoder.layers_*.mlp.wi_1",
    "blocks.*.mlp.hidden": "encoder.layers_*.mlp.wi",
    "blocks.*.mlp.down": "encoder.layers_*.mlp.wo",
    "final_norm": "encoder.encoder_norm",
}
_LEAVES = {"kernel": "kernel", "scale": "scale", "embedding": "embedding"}
_BIAS = "relpos_bias.embedding"  # [buckets, heads], our layout
_BIAS_BY_HEAD = "relpos_bias.rel_embedding"
_STACKED, _LAYER_AXIS = "encoder.encoder.", 1
# Axis of the heads in projections that have one. The next axis is the head width.
_HEAD_AXES = {"query": 1, "key": 1, "value": 1, "out": 0}


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A StoredTensor backed by an array in memory or by a TensorStore; both index alike."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def dtype(self) -> np.dtype:
        return getattr(self.array.dtype, "numpy_dtype", self.array.dtype)

    @property
    def T(self) -> ArrayTensor:
        return ArrayTensor(self.array.T)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        part = self.array[index]
        try:
            return part if isinstance(part, np.ndarray) else part.read().result()
        except ValueError as e:
            raise UserError(f"{self.array.kvstore.path}: cannot be read ({first_line(e)})") from e


@dataclasses.dataclass(frozen=True)
class JoinedTensor:
    """A view of a tensor that merges its axes `axis` and `axis + 1`.

    It has no `T`, because T5X stores kernels as [in, out], which is our layout.
    """

    tensor: ArrayTensor
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self._joined(self.tensor.shape)

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        width = self.tensor.shape[self.axis + 1]
        before, here, after = index[: self.axis], index[self.axis], index[self.axis + 1 :]
        start, stop, _ = here.indices(self.shape[self.axis])
        first = start // width
        rows = slice(first, -(-stop // width))
        part = self.tensor.read((*before, rows, slice(None), *after))
        part = part.reshape(self._joined(part.shape))
        inside = slice(start - first * width, stop - first * width)
        return part[(*[slice(None)] * self.axis, inside)]

    def _joined(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        a, b = shape[self.axis : self.axis + 2]
        return (*shape[: self.axis], a * b, *shape[self.axis + 2 :])


def is_t5x(folder: str | os.PathLike) -> bool:
    """Returns whether a folder has the layout of a T5X checkpoint."""
    return (Path(folder) / INDEX_FILE).is_file()


def open_t5x(folder: str | os.PathLike) -> Checkpoint:
    """Opens the encoder of a T5X checkpoint; ignores its decoder and optimizer state.

    Raises:
      UserError: the index or an array is damaged or missing, or the model is not a T5.
    """
    folder = Path(folder)
    tensors: dict[str, StoredTensor] = {}
    files = [folder / INDEX_FILE]
    # One compressed chunk may hold the parts of several devices. Cache it to unpack it once.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    for name, leaf in sorted(_encoder_leaves(folder / INDEX_FILE).items()):
        if isinstance(leaf, np.ndarray):
            tensor = ArrayTensor(leaf)
        else:
            array_folder = folder / f"target.{name}"
            tensor = _open_zarr(array_folder, context)
            files += sorted(path for path in array_folder.rglob("*") if path.is_file())
        tensors.update(_as_unrolled(name, tensor))
    config = _config(folder, tensors)
    return Checkpoint(
        folder=folder,
        module=T5Encoder,
        config=config,
        tensors=tensors,
        stored_name=namer(_NAMES, _LEAVES),
        kernels_reversed=False,
        files=files,
        tokenizer="ByT5Tokenizer" if config.vocab_size == _BYT5_VOCAB_SIZE else "T5Tokenizer",
    )


def _as_unrolled(name: str, tensor: ArrayTensor) -> Iterator[tuple[str, StoredTensor]]:
    """Yields the tensors inside a stored one, with the names and axes of the `t5` layout."""
    if name.startswith(_STACKED) and len(tensor.shape) > _LAYER_AXIS:
        if tensor.shape[_LAYER_AXIS] > MOST_LAYERS:
            raise UserError(
                f"{name}: has {tensor.shape[_LAYER_AXIS]} layers; at most {MOST_LAYERS}"
            )
        for number in range(tensor.shape[_LAYER_AXIS]):
            layer = f"encoder.layers_{number}.{name.removeprefix(_STACKED)}"
            yield from _as_unrolled(layer, ArrayTensor(tensor.array[:, number]))
    elif name.endswith(_BIAS_BY_HEAD):
        yield name.removesuffix(_BIAS_BY_HEAD) + _BIAS, tensor.T
    elif len(tensor.shape) == 3 and (axis := _HEAD_AXES.get(name.split(".")[-2])) is not None:
        yield name, JoinedTensor(tensor, axis)
    else:
        yield name, tensor


def _encoder_leaves(index: Path) -> dict[str, Any]:
    """Returns the index entries of the encoder: {"encoder.encoder_norm.scale": leaf}."""
    try:
        state = serialization.msgpack_restore(index.read_bytes())
        target = state.get("optimizer", state)["target"]
        parts = {name: target[name] for name in ("encoder", "token_embedder")}
    except Exception as e:  # damaged bytes make msgpack raise anything
        raise UserError(f"{index}: not the index of a T5X checkpoint ({first_line(e)})") from e
    # A leaf may be a map: the specification of its array.
    flat = traverse_util.flatten_dict(parts, is_leaf=lambda _, leaf: "kvstore" in leaf)
    return {".".join(path): leaf for path, leaf in flat.items()}


def _open_zarr(folder: Path, context: tensorstore.Context) -> ArrayTensor:
    if not (folder / ".zarray").is_file():
        raise UserError(f"{folder}: the index names this array, but it is missing")
    _check_sizes(folder)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder.absolute())},
        "fill_missing_data_reads": False,  # a lost file is an error, not zeros
    }
    try:
        return ArrayTensor(tensorstore.open(spec, read=True, context=context).result())
    except ValueError as e:
        raise UserError(f"{folder}: cannot be read as zarr ({first_line(e)})") from e


def _check_sizes(folder: Path) -> None:
    """Raises UserError if an array cannot be in its folder: TensorStore would run out of memory."""
    try:
        fields = read_json(folder / ".zarray")
    except UserError as e:
        raise UserError(f"{folder}: cannot be read as zarr ({e})") from e
    most = _MOST_COMPRESSION * sum(path.stat().st_size for path in folder.iterdir())
    for key in ("shape", "chunks"):
        sizes = fields.get(key)
        whole = isinstance(sizes, list) and all(type(n) is int and n > 0 for n in sizes)
        if not whole or len(sizes) > MOST_AXES or math.prod(sizes) > most:
            raise UserError(
                f"{folder / '.zarray'}: {key} is {sizes!r:.200}; the files can hold at most {most} "
                "numbers"
            )


def _config(folder: Path, tensors: dict[str, StoredTensor]) -> T5Config:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != rank:
            found = tensors[name].shape if name in tensors else "missing"
            raise UserError(f"{folder}: tensor {name!r} is {found}; expected {rank} axes")
        if not all(tensors[name].shape):
            raise UserError(f"{folder}: tensor {name!r} has shape {tensors[name].shape}")
        return tensors[name].shape

    vocab_size, d_model = shape("token_embedder.embedding", 2)
    layer = "encoder.layers_0"
    bias_in_every_block = f"{layer}.{_BIAS}" in tensors
    num_buckets, num_heads = shape(f"{layer if bias_in_every_block else 'encoder'}.{_BIAS}", 2)
    gated = f"{layer}.mlp.wi_0.kernel" in tensors
    return T5Config(
        d_model=d_model,
        d_kv=shape(f"{layer}.attention.query.kernel", 2)[1] // num_heads,
        d_ff=shape(f"{layer}.mlp.wo.kernel", 2)[0],
        num_layers=sum(name.endswith(".mlp.wo.kernel") for name in tensors),
        num_heads=num_heads,
        vocab_size=vocab_size,
        relative_attention_num_buckets=num_buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        bias_in_every_block=bias_in_every_block,
    )
