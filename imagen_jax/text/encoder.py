"""Turns captions into the embeddings that condition the diffusion models, deterministically."""

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

# Embedding tables have unused rows: sentinels, and padding to a round number.
MAX_UNUSED_ROWS = 1024

# The shape of a program affects the last bits of an embedding. So the shape depends on the caption
# alone: its length is rounded up to a bucket, and batches always have the same number of rows.
MIN_BUCKET = 16
BATCH = 32  # rows on each device

# Moves named arrays [rows, ...] to the devices, splitting the rows evenly.
Put = Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]


class Batch(NamedTuple):
    """The result of one call of the network.

    Attributes:
      embeddings: bfloat16 [num_tokens, dim] for each caption.
      positions: number of positions computed, including padding.
    """

    embeddings: dict[str, np.ndarray]
    positions: int


class TokenLimit:
    """The longest caption that an encoder takes. Create it with `load_token_limit`.

    Attributes:
      max_tokens: length limit of a caption in tokens, including its start and end tokens.
    """

    def __init__(self, tokenizer: Tokenizer, max_tokens: int):
        self.max_tokens = max_tokens
        self._tokenizer = tokenizer

    def num_tokens(self, caption: str) -> int:
        """Returns the number of tokens in `caption`, including its start and end tokens."""
        return len(self._tokenizer.encode(caption))

    def truncate(self, caption: str) -> str:
        """Returns the longest beginning of `caption` that fits in `max_tokens`.

        Cuts between words, unless the first word alone is too long.
        """
        if self.num_tokens(caption) <= self.max_tokens:
            return caption
        length, end = 0, len(caption)  # caption[:length] fits; caption[:end] does not
        while end - length > 1:
            middle = (length + end) // 2
            if self.num_tokens(caption[:middle]) <= self.max_tokens:
                length = middle
            else:
                end = middle
        words = caption[: length + 1].rpartition(" ")[0]
        return words or caption[:length]


class TextEncoder(TokenLimit):
    """A frozen encoder with its tokenizer. Create it with `load_encoder`.

    Attributes:
      dim: width of an embedding.
      dtype: type of an embedding, bfloat16.
      max_tokens: length limit of a caption in tokens, including its start and end tokens.
      identity: everything except the caption that determines an embedding, as JSON values. It is
        stored with precomputed embeddings and compared before they are used.
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
        super().__init__(tokenizer, max_tokens)
        self.dim = module.config.dim
        self.identity = identity
        self._max_positions = module.config.max_positions or math.inf
        self._put, self._rows = put or (lambda batch: batch), BATCH * ways
        graphdef, self._weights = nnx.split(module)

        @jax.jit
        def apply(weights, ids_bt, mask_bt):
            # By default TPUs multiply float32 in bfloat16, and GPUs in TF32. Embeddings computed on
            # one kind of machine must agree with those computed on another.
            with jax.default_matmul_precision("highest"):
                return nnx.merge(graphdef, weights)(ids_bt, mask_bt).astype(jnp.bfloat16)

        self._apply = apply

    def __call__(self, ids_bt: jax.Array, mask_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps token ids int [B, T] and a mask bool [B, T] to bfloat16 [B, T, dim] and the mask.

        The mask is True at real tokens. Embeddings at padding are meaningless.
        """
        return self._apply(self._weights, ids_bt, mask_bt), mask_bt

    def check(self, captions: Iterable[str], truncate: bool = False) -> None:
        """Raises UserError if `encode` would refuse one of the captions."""
        for caption in captions:
            self._checked_ids(caption, truncate)

    def encode(
        self,
        captions: Sequence[str],
        progress: Callable[[int, int], None] | None = None,
        truncate: bool = False,
    ) -> list[np.ndarray]:
        """Returns one bfloat16 array [num_tokens, dim] per caption, independent of the others.

        Args:
          captions: equal captions are encoded once and share an array.
          progress: called after each batch with (done, total), counting distinct captions.
          truncate: encode a caption that is too long as `truncate(caption)`. Its embedding still
            ends with the end-of-sequence token.

        Raises:
          UserError: a caption is not valid Unicode, or has more than `max_tokens` tokens and
            `truncate` is false.
        """
        distinct = dict.fromkeys(captions)
        embeddings: dict[str, np.ndarray] = {}
        for batch in self.batches(distinct, truncate):
            embeddings.update(batch.embeddings)
            if progress is not None:
                progress(len(embeddings), len(distinct))
        return [embeddings[caption] for caption in captions]

    def batches(self, captions: Iterable[str], truncate: bool = False) -> Iterator[Batch]:
        """Yields the embeddings of distinct captions batch by batch, shortest captions first.

        Raises:
          UserError: as for `encode`, before the first batch is computed.
        """
        buckets = defaultdict(list)
        for caption in captions:
            ids = self._checked_ids(caption, truncate)
            buckets[min(_bucket(len(ids)), self._max_positions)].append((caption, ids))
        for length, rows in sorted(buckets.items()):
            for start in range(0, len(rows), self._rows):
                batch = rows[start : start + self._rows]
                yield Batch(self._encode_batch(batch, length), self._rows * length)

    def _checked_ids(self, caption: str, truncate: bool) -> list[int]:
        ids = self._tokenizer.encode(caption)
        if truncate and len(ids) > self.max_tokens:
            ids = self._tokenizer.encode(self.truncate(caption))
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
        # A view would keep the whole padded batch in memory.
        return {c: out_btd[row, : len(ids)].copy() for row, (c, ids) in enumerate(batch)}


def _bucket(num_tokens: int) -> int:
    """Rounds up to a power of two or 3/4 of one, for few programs and little padding."""
    power = 1 << (num_tokens - 1).bit_length()
    return max(MIN_BUCKET, power * 3 // 4 if num_tokens <= power * 3 // 4 else power)


def load_encoder(
    name_or_path: str | os.PathLike = "byte-tiny",
    max_tokens: int = 192,
    place: Place | None = None,
    put: Put | None = None,
    ways: int = 1,
) -> TextEncoder:
    """Loads a frozen encoder, bundled or from a folder.

    Args:
      name_or_path: a bundled encoder, a folder in Hugging Face's format (T5, BERT, CLIP), or a
        T5X checkpoint folder that also holds the vocabulary. The suffix "-bfloat16" keeps the
        weights in bfloat16; "-random" replaces them with random ones.
      max_tokens: length limit of a caption in tokens.
      place: maps weight shapes to shardings, for example
        `functools.partial(sharding.weight_shardings, mesh)`.
      put: copies a batch to the devices, for example
        `functools.partial(sharding.put_batch, mesh)` (default: to the default device).
      ways: number of shards into which `put` splits a batch.

    Raises:
      UserError: there is no such encoder; a file is missing, damaged or of an unsupported model;
        weights and vocabulary do not match; max_tokens is below 1 or beyond the encoder's
        positions.
    """
    checkpoint, tokenizer = _open(name_or_path, max_tokens)
    module = checkpoint.load(place)
    identity = _identity(checkpoint, tokenizer, max_tokens)
    return TextEncoder(module, tokenizer, max_tokens, identity, put, ways)


def load_token_limit(name_or_path: str | os.PathLike, max_tokens: int) -> TokenLimit:
    """Loads only the tokenizer of an encoder.

    Raises:
      UserError: as for `load_encoder`.
    """
    _, tokenizer = _open(name_or_path, max_tokens)
    return TokenLimit(tokenizer, max_tokens)


def encoder_identity(
    name_or_path: str | os.PathLike, max_tokens: int = 192
) -> dict[str, Any] | None:
    """Returns `load_encoder(name_or_path, max_tokens).identity` without loading weights.

    Returns None if this machine has no such encoder.

    Raises:
      UserError: as for `load_encoder`.
    """
    if find_encoder(name_or_path) is None:
        return None
    return _identity(*_open(name_or_path, max_tokens), max_tokens)


def _bundled() -> dict[str, Path]:
    """Returns the folders of the bundled encoders by name."""
    return {path.name: path for path in sorted(BUNDLED.iterdir())}


def find_encoder(name_or_path: str | os.PathLike) -> tuple[Path, str] | None:
    """Returns an encoder's folder and variant, or None if this machine has no such encoder.

    An existing folder wins over a variant: "x-random" is the folder of that name if there is one.
    """
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
    found = find_encoder(name_or_path)
    if found is None:
        raise UserError(
            f"text encoder {str(name_or_path)!r} is not a folder, and not bundled "
            f"({', '.join(_bundled())}). Nothing is downloaded: pass a folder with the model's "
            f"files, see docs/text.md ({' or '.join(VARIANTS)} may follow the name)"
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
    """Raises UserError unless weights, vocabulary and token limit match."""
    folder, config = str(checkpoint.folder), checkpoint.config
    if not 0 <= config.vocab_size - tokenizer.vocab_size < MAX_UNUSED_ROWS:
        raise UserError(
            f"text encoder {folder!r}: its {tokenizer.name} vocabulary has {tokenizer.vocab_size} "
            f"tokens, but its weights have {config.vocab_size}; they belong to different encoders"
        )
    if config.max_positions is not None and max_tokens > config.max_positions:
        raise UserError(
            f"max_tokens is {max_tokens}; text encoder {folder!r} has only {config.max_positions} "
            "positions"
        )
