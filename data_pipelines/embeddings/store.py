"""A store of embeddings, looked up by caption and written in complete shards.

    store.json                     the encoder's identity, number format and number of shards
    shard-00003-of-00016.tfrecord  one record per embedding
    shard-00003-of-00016.npy       INDEX: the records' positions, sorted by key
    shard-00003-of-00016.json      counts and skipped captions; written last, so a shard without
                                   this file is unfinished
    report.json                    the same for the whole store, written after the last shard

The key of a caption is its hash, and each shard holds a range of keys. The contents of a shard
depend only on the captions and the encoder, so any process can write any shard at any time. This
module does not import TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_json

INDEX = np.dtype([("key", "S16"), ("offset", "<i8"), ("tokens", "<i4")])
RECORD_FRAME = 16  # bytes that TFRecord adds to each record
_STORE = "store.json"
_HASHED = ("weights_sha256", "tokenizer", "tokenizer_sha256", "dtype")


@dataclasses.dataclass(frozen=True)
class Form:
    """Storage format of an embedding bfloat16 [n, dim], in n * token_bytes(dim) bytes."""

    pack: Callable[[np.ndarray], bytes]
    unpack: Callable[[bytes, int], np.ndarray]
    token_bytes: Callable[[int], int]


def _int8_token(dim: int) -> np.dtype:
    return np.dtype([("scale", "<f4"), ("values", "i1", (dim,))])


def _pack_int8(embedding: np.ndarray) -> bytes:
    values = embedding.astype(np.float32)
    tokens = np.zeros(len(values), _int8_token(values.shape[1]))
    tokens["scale"] = np.abs(values).max(axis=1) / 127
    scale = np.where(tokens["scale"] > 0, tokens["scale"], 1)[:, None]
    tokens["values"] = np.round(values / scale)
    return tokens.tobytes()


def _unpack_int8(data: bytes, dim: int) -> np.ndarray:
    tokens = np.frombuffer(data, _int8_token(dim))
    return (tokens["values"] * tokens["scale"][:, None]).astype(ml_dtypes.bfloat16)


FORMS = {
    "bfloat16": Form(
        pack=np.ndarray.tobytes,
        unpack=lambda data, dim: np.frombuffer(data, ml_dtypes.bfloat16).reshape(-1, dim),
        token_bytes=lambda dim: 2 * dim,
    ),
    # Each token has a scale that maps its largest absolute value to 127.
    "int8": Form(_pack_int8, _unpack_int8, lambda dim: _int8_token(dim).itemsize),
}


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder of embeddings.

    Attributes:
      text_identity: identity of the TextEncoder that computed them.
      dtype: a key of FORMS.
    """

    path: epath.Path
    text_identity: Mapping[str, Any]
    dtype: str
    num_shards: int

    @property
    def dim(self) -> int:
        """Width of an embedding."""
        return self.text_identity["dim"]

    def file(self, shard: int, suffix: str) -> epath.Path:
        """Returns the file of a shard that ends in `suffix`."""
        return self.path / f"shard-{shard:05d}-of-{self.num_shards:05d}{suffix}"

    def shard_of(self, key: bytes) -> int:
        """Returns the shard of a key. Shards have equal key ranges."""
        return int.from_bytes(key[:4], "big") * self.num_shards >> 32

    def finished(self) -> list[int]:
        """Returns the finished shards."""
        return [i for i in range(self.num_shards) if self.file(i, ".json").exists()]

    def report(self, shard: int) -> dict[str, Any] | None:
        """Returns the report of a shard, or None if it is unfinished."""
        path = self.file(shard, ".json")
        return json.loads(path.read_text()) if path.exists() else None

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Finds the embeddings of keys S16 [n]: int64 [n, 2], the shard and the byte offset in it.

        Both are -1 for a key that is not in the store.
        """
        where = np.full((len(keys), 2), -1, np.int64)
        shards = np.array([self.shard_of(key) for key in keys.tolist()], np.int64)
        for shard in np.unique(shards):
            [rows] = np.nonzero(shards == shard)
            index = self.index(shard)
            slots = np.searchsorted(index["key"], keys[rows])
            inside = slots < len(index)
            rows, slots = rows[inside], slots[inside]
            found = index["key"][slots] == keys[rows]
            where[rows[found]] = np.stack(
                [np.full(found.sum(), shard), index["offset"][slots[found]]], axis=1
            )
        return where

    def index(self, shard: int) -> np.ndarray:
        """Reads the INDEX of a shard, sorted by key."""
        path = self.file(shard, ".npy")
        try:
            with path.open("rb") as file:
                return np.load(file).astype(INDEX, copy=False)
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{path}: missing or damaged: {str(e).splitlines()[0]}") from e


def create_store(path: str, text_identity: Mapping[str, Any], dtype: str, num_shards: int) -> Store:
    """Creates the store at `path`, or continues one with the same settings.

    Raises:
      UserError: the folder holds a store with other settings, or cannot be written to.
    """
    folder = epath.Path(path)
    wanted = {**text_identity, "stored_dtype": dtype, "num_shards": num_shards}
    if (folder / _STORE).exists():
        there = _read_settings(folder)
        if differing := [
            f"{key}={there.get(key)} (now {wanted.get(key)})"
            for key in sorted(there.keys() | wanted.keys())
            if there.get(key) != wanted.get(key)
        ]:
            raise UserError(
                f"--out={path} is a store made with {'; '.join(differing)}. Choose another --out"
            )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _STORE, wanted)
    except OSError as e:
        raise UserError(f"--out={path} cannot be written to: {e.strerror}") from e
    return Store(folder, dict(text_identity), dtype, num_shards)


def open_store(path: str) -> Store:
    """Opens the complete store at `path` for reading.

    Raises:
      UserError: there is no store, or shards are missing.
    """
    folder = epath.Path(path)
    if not (folder / _STORE).exists():
        raise UserError(
            f"data.embeddings={path} holds no store; make it with: "
            f"python -m data_pipelines.encode_text --out={path}"
        )
    settings = _read_settings(folder)
    try:
        dtype, num_shards = settings.pop("stored_dtype"), settings.pop("num_shards")
        store = Store(folder, settings, dtype, num_shards)
        done = len(store.finished())
        FORMS[dtype], store.dim
    except (KeyError, TypeError) as e:
        raise UserError(f"{folder / _STORE}: damaged: {e}") from e
    if done < num_shards:
        raise UserError(
            f"data.embeddings={path} has {done} of its {num_shards} shards; run the encode_text "
            "command that started it again to add the others"
        )
    return store


def _read_settings(folder: epath.Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / _STORE).read_text())
    except ValueError as e:
        raise UserError(f"{folder / _STORE}: not valid JSON ({e})") from e
    if not isinstance(settings, dict):
        raise UserError(f"{folder / _STORE}: not a JSON object")
    return settings


def check_identity(
    identity: Mapping[str, Any], encoder: str, dim: int, max_tokens: int, where: str
) -> None:
    """Raises UserError unless embeddings come from the encoder that a config names.

    Compares name and width, and the hashes of the encoder's files if they are on this machine. Does
    not load weights.

    Args:
      identity: the identity stored with the embeddings.
      encoder: config.text.encoder; `dim` and `max_tokens` are the keys of that name.
      where: location of the embeddings, for the message.
    """
    if identity["encoder"] != Path(encoder).name:
        from imagen_jax.text.encoder import find_encoder  # imports JAX, which --help does not need

        hint = (
            ""
            if find_encoder(encoder)
            else " and is not a folder here (nothing is downloaded, see docs/text.md)"
        )
        raise UserError(
            f"config.text.encoder is {encoder!r}{hint}; the embeddings of {where} have "
            f"{identity['encoder']!r}"
        )
    if identity["dim"] != dim:
        raise UserError(
            f"config.text.dim is {dim}; the embeddings of {where} have {identity['dim']}"
        )
    if identity["max_tokens"] > max_tokens:
        raise UserError(
            f"config.text.max_tokens is {max_tokens}; the captions of {where} were encoded with up "
            f"to {identity['max_tokens']} tokens"
        )
    here = _identity_here(encoder, identity["max_tokens"])
    differing = [key for key in _HASHED if key in identity and here and identity[key] != here[key]]
    if differing:
        wanted, stored = (" ".join(f"{k}={i[k]}" for k in differing) for i in (here, identity))
        raise UserError(
            f"config.text.encoder is {encoder!r} with {wanted}; the embeddings of {where} come "
            f"from one with {stored}"
        )


@functools.cache
def _identity_here(encoder: str, max_tokens: int) -> dict[str, Any] | None:
    from imagen_jax.text import encoder_identity  # imports JAX, which --help does not need

    return encoder_identity(encoder, max_tokens)
