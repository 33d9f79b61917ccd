"""T5 checkpoints as T5X writes them: a msgpack index, and a zarr array for each large tensor.

The index, a file named `checkpoint`, is the train state as nested maps. A leaf is the array
itself, or stands for the array in the folder `target.encoder.layers_0.attention.key.kernel`.
There is no config: the shapes say everything that the published T5 checkpoints differ in.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore
from flax import serialization, traverse_util

from imagen_jax.errors import UserError
from imagen_jax.text.families import namer
from imagen_jax.text.files import first_line
from imagen_jax.text.loading import Checkpoint
from imagen_jax.text.stored import StoredTensor
from imagen_jax.text.t5 import T5Config, T5Encoder

INDEX_FILE = "checkpoint"
_CACHE_BYTES = 2**28
_BYT5_VOCAB_SIZE = 384  # which no other vocabulary has

_NAMES = {
    "embed": "token_embedder",
    "relative_bias.table": "encoder.relpos_bias",
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
_POSITIONS = "encoder.relpos_bias.embedding"  # [buckets, heads], as everywhere else
_POSITIONS_BY_HEAD = "encoder.relpos_bias.rel_embedding"


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A StoredTensor that is in memory already, or a TensorStore, which is indexed alike."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    @property
    def T(self) -> ArrayTensor:
        return ArrayTensor(self.array.T)

    def read(self, index: tuple[slice, ...]) -> np.ndarray:
        part = self.array[index]
        try:
            return part if isinstance(part, np.ndarray) else part.read().result()
        except ValueError as e:
            raise UserError(f"{self.array.kvstore.path}: cannot be read ({first_line(e)})") from e


def is_t5x(folder: str | os.PathLike) -> bool:
    """Whether a folder is laid out as a T5X checkpoint."""
    return (Path(folder) / INDEX_FILE).is_file()


def open_t5x(folder: str | os.PathLike) -> Checkpoint:
    """The encoder of a T5X checkpoint; its decoder and optimizer state are left unread.

    Raises:
        UserError: the index or an array is damaged or missing, or it holds no T5.
    """
    folder = Path(folder)
    tensors: dict[str, StoredTensor] = {}
    files = [folder / INDEX_FILE]
    # Several devices' parts may lie in one compressed chunk; it is unpacked for all of them.
    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": _CACHE_BYTES}})
    for name, leaf in sorted(_encoder_leaves(folder / INDEX_FILE).items()):
        if isinstance(leaf, np.ndarray):
            tensors[name] = ArrayTensor(leaf)
        else:
            array_folder = folder / f"target.{name}"
            tensors[name] = _open_zarr(array_folder, context)
            files += sorted(path for path in array_folder.rglob("*") if path.is_file())
    config = _config(folder, tensors)
    tensors[_POSITIONS] = tensors.pop(_POSITIONS_BY_HEAD).T
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


def _encoder_leaves(index: Path) -> dict[str, Any]:
    """The index's entries for the encoder: {"encoder.encoder_norm.scale": leaf}."""
    try:
        state = serialization.msgpack_restore(index.read_bytes())
        target = state.get("optimizer", state)["target"]
        parts = {name: target[name] for name in ("encoder", "token_embedder")}
    except Exception as e:  # msgpack raises whatever damaged bytes lead it to
        raise UserError(f"{index}: not the index of a T5X checkpoint ({first_line(e)})") from e
    # A leaf may be a map, the specification of its array.
    flat = traverse_util.flatten_dict(parts, is_leaf=lambda _, leaf: "kvstore" in leaf)
    return {".".join(path): leaf for path, leaf in flat.items()}


def _open_zarr(folder: Path, context: tensorstore.Context) -> ArrayTensor:
    if not (folder / ".zarray").is_file():
        raise UserError(f"{folder}: the index names this array, which is not there")
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(folder.absolute())},
        "fill_missing_data_reads": False,  # a lost file is an error, not zeros
    }
    try:
        return ArrayTensor(tensorstore.open(spec, read=True, context=context).result())
    except ValueError as e:
        raise UserError(f"{folder}: cannot be read as zarr ({first_line(e)})") from e


def _config(folder: Path, tensors: dict[str, StoredTensor]) -> T5Config:
    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in tensors or len(tensors[name].shape) != rank:
            found = tensors[name].shape if name in tensors else "missing"
            raise UserError(f"{folder}: tensor {name!r} of {rank} axes expected; it is {found}")
        return tensors[name].shape

    vocab_size, d_model = shape("token_embedder.embedding", 2)
    num_heads, num_buckets = shape(_POSITIONS_BY_HEAD, 2)
    layer = "encoder.layers_0"
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
    )
