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

import bisect
import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from data_pipelines.records.files import load_array
from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError, first_line
from imagen_jax.common.files import write_json

INDEX = np.dtype([("key", "S16"), ("offset", "<i8"), ("tokens", "<i4")])
_STORE = "store.json"
_MOST = 2**31
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
    _indices: dict[int, np.ndarray] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

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

    def find(self, key: bytes) -> tuple[int, int, int] | None:
        """Returns the shard, byte offset and tokens of the embedding of a key; None if missing."""
        shard = self.shard_of(key)
        index = self.index(shard)
        slot = bisect.bisect_left(index, key, key=_key)
        if slot == len(index) or _key(index[slot]) != key:
            return None
        return shard, int(index[slot]["offset"]), int(index[slot]["tokens"])

    def index(self, shard: int) -> np.ndarray:
        """Opens the INDEX of a shard, sorted by key, memory-mapped."""
        if shard not in self._indices:
            path = self.file(shard, ".npy")
            try:
                self._indices[shard] = load_array(str(path)).astype(INDEX, copy=False)
            except (OSError, ValueError, TypeError) as e:
                raise UserError(f"{path}: missing or damaged: {first_line(e)}") from e
        return self._indices[shard]


def _key(row: np.void) -> bytes:
    return bytes(row["key"]).ljust(16, b"\0")  # NumPy strips trailing zeros


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
    buckets.check(path)
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
        for name, number in (("dim", FORMS[dtype] and store.dim), ("num_shards", num_shards)):
            if type(number) is not int or not 0 < number < _MOST:
                raise ValueError(f"{name} is {number!r:.100}")
    except (KeyError, TypeError, ValueError) as e:
        raise UserError(f"{folder / _STORE}: damaged: {e}") from e
    # Listed: trying the names of all shards would take as long as a damaged number says.
    done = sum(1 for _ in folder.glob(f"shard-*-of-{num_shards:05d}.json"))
    if done < num_shards:
        raise UserError(
            f"data.embeddings={path} has {done} of its {num_shards} shards; run the encode_text "
            "command that started it again to add the others"
        )
    return store


def _read_settings(folder: epath.Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / _STORE).read_text())
    except (ValueError, RecursionError) as e:
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
    numbers = [identity.get(key) for key in ("dim", "max_tokens")]
    if type(identity.get("encoder")) is not str or any(type(n) is not int for n in numbers):
        raise UserError(f"the embeddings of {where} are of an unknown encoder: damaged metadata")
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
