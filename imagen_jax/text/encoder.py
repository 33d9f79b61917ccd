"""Captions to the embeddings that the diffusion models are conditioned on, always the same."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from imagen_jax.common.errors import UserError
from imagen_jax.text.hf_format import open_hf
from imagen_jax.text.loading import VARIANTS, Checkpoint, Place
from imagen_jax.text.t5x_format import is_t5x, open_t5x
from imagen_jax.text.tokenizer import PAD_ID, Tokenizer, load_tokenizer

BUNDLED = Path(__file__).parent / "weights"
DTYPE = np.dtype(ml_dtypes.bfloat16)

# Embedding tables have rows that no caption needs: sentinels, and padding to a round number.
MAX_UNUSED_ROWS = 1024

# An embedding depends on the shape of the program that computed it, in the last bits. So a shape
# depends on the caption alone: its length rounded up to a bucket, in a batch that is always full.
MIN_BUCKET = 16
BATCH = 32  # rows on each device

# Moves arrays [rows, ...] by name to the devices, the rows split evenly over them.
Put = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


class Batch(NamedTuple):
    """What one call of the network gave.

    Attributes:
        embeddings: bfloat16 [num_tokens, dim] of each caption.
        positions: how many the network computed, padding included.
    """

    embeddings: dict[str, np.ndarray]
    positions: int


class TextEncoder:
    """A frozen encoder with its tokenizer; `load_encoder` makes one.

    Attributes:
        dim: width of an embedding.
        dtype: of an embedding, bfloat16.
        max_tokens: the longest caption taken, in tokens, those that mark its beginning and end
            included.
        identity: what an embedding depends on besides its caption, JSON-able: stored with
            embeddings computed ahead, and compared before they are used.
    """

    dtype = DTYPE

    def __init__(
        self,
        module: nnx.Module,
        tokenizer: Tokenizer,
        max_tokens: int,
        identity: dict,
        put: Put | None = None,
        ways: int = 1,
    ):
        self.dim = module.config.dim
        self.max_tokens = max_tokens
        self.identity = identity
        self._tokenizer = tokenizer
        self._max_positions = module.config.max_positions or math.inf
        self._put, self._rows = put or (lambda batch: batch), BATCH * ways
        graphdef, self._weights = nnx.split(module)

        @jax.jit
        def apply(weights, ids_bt, mask_bt):
            # By default TPUs multiply float32 in bfloat16 and GPUs in TF32; embeddings computed
            # once on one machine and sampled with on another have to agree.
            with jax.default_matmul_precision("highest"):
                return nnx.merge(graphdef, weights)(ids_bt, mask_bt).astype(jnp.bfloat16)

        self._apply = apply

    def __call__(self, ids_bt: jax.Array, mask_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Token ids int [B, T] and bool [B, T], True at real tokens -> bfloat16 [B, T, dim], mask.

        Embeddings at padding are meaningless.
        """
        return self._apply(self._weights, ids_bt, mask_bt), mask_bt

    def num_tokens(self, caption: str) -> int:
        """How many tokens `caption` has, those that mark its beginning and end included."""
        return len(self._tokenizer.encode(caption))

    def check(self, captions: Iterable[str]) -> None:
        """Raises UserError if a caption has more than `max_tokens` tokens or is no Unicode."""
        for caption in captions:
            self._checked_ids(caption)

    def encode(
        self, captions: Sequence[str], progress: Callable[[int, int], None] | None = None
    ) -> list[np.ndarray]:
        """One bfloat16 array [num_tokens, dim] a caption, whatever else is encoded with it.

        Args:
            captions: each distinct one is encoded once; equal ones share an array.
            progress: called with (done, total), counted in distinct captions, after each batch.

        Raises:
            UserError: a caption has more than `max_tokens` tokens or is not valid Unicode.
        """
        distinct = dict.fromkeys(captions)
        embeddings: dict[str, np.ndarray] = {}
        for batch in self.batches(distinct):
            embeddings.update(batch.embeddings)
            if progress is not None:
                progress(len(embeddings), len(distinct))
        return [embeddings[caption] for caption in captions]

    def batches(self, captions: Iterable[str]) -> Iterator[Batch]:
        """The embeddings of distinct captions, the shortest first, as they are computed.

        Raises:
            UserError: as for `encode`, before anything is computed.
        """
        buckets = defaultdict(list)
        for caption in captions:
            ids = self._checked_ids(caption)
            buckets[min(_bucket(len(ids)), self._max_positions)].append((caption, ids))
        for length, rows in sorted(buckets.items()):
            for start in range(0, len(rows), self._rows):
                batch = rows[start : start + self._rows]
                yield Batch(self._encode_batch(batch, length), self._rows * length)

    def _checked_ids(self, caption: str) -> list[int]:
        ids = self._tokenizer.encode(caption)
        if len(ids) > self.max_tokens:
            shown = caption if len(caption) <= 40 else caption[:37] + "..."
            raise UserError(
                f"caption {shown!r} has {len(ids)} tokens; max_tokens allows {self.max_tokens}"
            )
        return ids

    def _encode_batch(
        self, batch: list[tuple[str, list[int]]], length: int
    ) -> dict[str, np.ndarray]:
        ids_bt = np.full((self._rows, length), PAD_ID, np.int32)
        mask_bt = np.zeros((self._rows, length), bool)
        for row, (_, ids) in enumerate(batch):
            ids_bt[row, : len(ids)] = ids
            mask_bt[row, : len(ids)] = True
        out_btd = np.asarray(self(**self._put({"ids_bt": ids_bt, "mask_bt": mask_bt}))[0])
        # Copies, because a view would keep its whole padded batch in memory.
        return {c: out_btd[row, : len(ids)].copy() for row, (c, ids) in enumerate(batch)}


def _bucket(num_tokens: int) -> int:
    """The next power of two or three quarters of one: few programs, and little padding."""
    power = 1 << (num_tokens - 1).bit_length()
    return max(MIN_BUCKET, power * 3 // 4 if num_tokens <= power * 3 // 4 else power)


def load_encoder(
    name_or_path: str | os.PathLike = "byte-tiny",
    max_tokens: int = 192,
    place: Place | None = None,
    put: Put | None = None,
    ways: int = 1,
) -> TextEncoder:
    """A frozen encoder by the name of a bundled one, or from a folder with its files.

    Args:
        name_or_path: a bundled encoder; or a folder in Hugging Face's format (T5, BERT, CLIP), or a
            T5X checkpoint beside whose arrays the vocabulary lies. Either with "-bfloat16" after it
            for weights that are kept in bfloat16, or "-random" for random ones.
        max_tokens: the longest caption to take.
        place: where the weights go, from their shapes: for instance
            `functools.partial(sharding.weight_shardings, mesh)`.
        put: where a batch goes, for instance `functools.partial(sharding.put_batch, mesh)`; by
            default to the default device.
        ways: into how many parts `put` splits a batch.

    Raises:
        UserError: no such encoder; a file is missing, damaged or of another kind of model;
            weights and vocabulary do not match; max_tokens is below 1 or beyond the encoder's
            positions.
    """
    checkpoint, tokenizer = _open(name_or_path, max_tokens)
    module = checkpoint.load(place)
    identity = _identity(checkpoint, tokenizer, max_tokens)
    return TextEncoder(module, tokenizer, max_tokens, identity, put, ways)


def encoder_identity(
    name_or_path: str | os.PathLike, max_tokens: int = 192
) -> dict[str, Any] | None:
    """What `load_encoder(name_or_path, max_tokens).identity` would be; no weight is loaded.

    Returns:
        None if there is no such encoder here.

    Raises:
        UserError: as for `load_encoder`.
    """
    if _find(name_or_path) is None:
        return None
    return _identity(*_open(name_or_path, max_tokens), max_tokens)


def _bundled() -> dict[str, Path]:
    """The folders of the bundled encoders by their names."""
    return {path.name: path for path in sorted(BUNDLED.iterdir())}


def _find(name_or_path: str | os.PathLike) -> tuple[Path, str] | None:
    """An encoder's folder, and its variant; a folder that is there is taken by its own name."""
    name = str(name_or_path)
    for variant in ("", *VARIANTS):
        stem = name.removesuffix(variant)
        folder = _bundled().get(stem, Path(stem))
        if name.endswith(variant) and folder.is_dir():
            return folder, variant
    return None


def _open(name_or_path: str | os.PathLike, max_tokens: int) -> tuple[Checkpoint, Tokenizer]:
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
    found = _find(name_or_path)
    if found is None:
        raise UserError(
            f"text encoder {str(name_or_path)!r}: neither a folder nor one of "
            f"{', '.join(_bundled())}; either may have {' or '.join(VARIANTS)} after it"
        )
    folder, variant = found
    checkpoint = open_t5x(folder) if is_t5x(folder) else open_hf(folder)
    checkpoint = dataclasses.replace(checkpoint, variant=variant)
    tokenizer = load_tokenizer(folder, checkpoint.tokenizer)
    _check_match(checkpoint, tokenizer, max_tokens)
    return checkpoint, tokenizer


def _identity(checkpoint: Checkpoint, tokenizer: Tokenizer, max_tokens: int) -> dict[str, Any]:
    return {
        "encoder": checkpoint.name,
        "weights_sha256": checkpoint.weights_sha256,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "max_tokens": max_tokens,
        "dim": checkpoint.config.dim,
        "dtype": DTYPE.name,
    }


def _check_match(checkpoint: Checkpoint, tokenizer: Tokenizer, max_tokens: int) -> None:
    """Raises UserError unless weights, vocabulary and the token limit go together."""
    folder, config = str(checkpoint.folder), checkpoint.config
    if not 0 <= config.vocab_size - tokenizer.vocab_size < MAX_UNUSED_ROWS:
        raise UserError(
            f"text encoder {folder!r}: its {tokenizer.name} vocabulary has {tokenizer.vocab_size} "
            f"tokens, its weights have {config.vocab_size}; they belong to different encoders"
        )
    if config.max_positions is not None and max_tokens > config.max_positions:
        raise UserError(
            f"max_tokens is {max_tokens}; text encoder {folder!r} has {config.max_positions} "
            "positions"
        )
