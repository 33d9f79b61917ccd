"""A store of caption embeddings: found by the caption, written in shards that are whole or absent.

    store.json                     the encoder's identity, the form of the numbers, how many shards
    shard-00003-of-00016.tfrecord  a record for each caption's embedding
    shard-00003-of-00016.npy       INDEX: where they are, sorted by key
    shard-00003-of-00016.json      counts and skipped captions; written last, so that a shard
                                   without it does not exist
    report.json                    the same of all shards together, once they are there

A key is a hash of its caption, and each shard has a range of keys. What is in a shard depends on
nothing but the captions and the encoder, so it does not matter who wrote which and when. Nothing
here imports TensorFlow before a shard is written.
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
RECORD_FRAME = 16  # bytes that a TFRecord file adds to each record
_STORE = "store.json"
_HASHED = ("weights_sha256", "tokenizer", "tokenizer_sha256", "dtype")


@dataclasses.dataclass(frozen=True)
class Form:
    """How an embedding bfloat16 [n, dim] is stored, as n * token_bytes(dim) bytes."""

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
    # The largest number of a token, positive or negative, becomes 127.
    "int8": Form(_pack_int8, _unpack_int8, lambda dim: _int8_token(dim).itemsize),
}


@dataclasses.dataclass(frozen=True)
class Store:
    """A folder of embeddings.

    Attributes:
      text_identity: the identity of the TextEncoder that made them.
      dtype: a key of FORMS.
    """

    path: epath.Path
    text_identity: Mapping[str, Any]
    dtype: str
    num_shards: int

    @property
    def dim(self) -> int:
        """The width of an embedding."""
        return self.text_identity["dim"]

    def file(self, shard: int, suffix: str) -> epath.Path:
        """The file of a shard that ends in `suffix`."""
        return self.path / f"shard-{shard:05d}-of-{self.num_shards:05d}{suffix}"

    def shard_of(self, key: bytes) -> int:
        """The shard that has this key: each has an equal range of them."""
        return int.from_bytes(key[:4], "big") * self.num_shards >> 32

    def finished(self) -> list[int]:
        """The shards that are there."""
        return [i for i in range(self.num_shards) if self.file(i, ".json").exists()]

    def report(self, shard: int) -> dict[str, Any] | None:
        """What is known of a shard, or None if it is not there."""
        path = self.file(shard, ".json")
        return json.loads(path.read_text()) if path.exists() else None

    def locate(self, keys: np.ndarray) -> np.ndarray:
        """Where the embeddings of keys S16 [n] are: int64 [n, 2], the shard and the byte in it.

        -1 where the store has none.
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
        """INDEX of a shard's captions, sorted by key."""
        path = self.file(shard, ".npy")
        try:
            with path.open("rb") as file:
                return np.load(file).astype(INDEX, copy=False)
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{path}: missing or damaged: {str(e).splitlines()[0]}") from e


def create_store(path: str, text_identity: Mapping[str, Any], dtype: str, num_shards: int) -> Store:
    """The store at `path`, begun now or earlier with the same settings.

    Raises:
      UserError: another store is there, or the folder cannot be written to.
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
    """The complete store at `path`, for reading.

    Raises:
      UserError: there is none, or some of its shards are missing.
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
            f"data.embeddings={path} has {done} of its {num_shards} shards; the command that "
            "began it adds the others"
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
    """Raises UserError unless embeddings are those of the encoder that a config names.

    Its name and width are compared and, if its files are on this machine, their hashes; the weights
    are not loaded.

    Args:
      identity: what is stored with the embeddings.
      encoder: config.text.encoder, with its dim and max_tokens.
      where: the embeddings are, for the message.
    """
    for key, wanted in (("encoder", Path(encoder).name), ("dim", dim)):
        if identity[key] != wanted:
            raise UserError(
                f"config.text.{key} is {wanted!r}; the embeddings of {where} have {identity[key]!r}"
            )
    if identity["max_tokens"] > max_tokens:
        raise UserError(
            f"config.text.max_tokens is {max_tokens}; the captions of {where} were encoded with "
            f"up to {identity['max_tokens']} tokens"
        )
    here = _identity_here(encoder, identity["max_tokens"])
    differing = [key for key in _HASHED if key in identity and here and identity[key] != here[key]]
    if differing:
        wanted, stored = (" ".join(f"{k}={i[k]}" for k in differing) for i in (here, identity))
        raise UserError(
            f"config.text.encoder is {encoder!r} with {wanted}; the embeddings of {where} are of "
            f"one with {stored}"
        )


@functools.cache
def _identity_here(encoder: str, max_tokens: int) -> dict[str, Any] | None:
    from imagen_jax.text import encoder_identity  # imports JAX, which --help does not need

    return encoder_identity(encoder, max_tokens)
