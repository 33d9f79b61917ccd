"""Captions to the embeddings that the diffusion models are conditioned on, always the same."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx

from imagen_jax.errors import UserError
from imagen_jax.text.hf_format import WEIGHTS_FILE, load_t5, read_config
from imagen_jax.text.t5 import T5Encoder
from imagen_jax.text.tokenizer import PAD_ID, ByteTokenizer

BUNDLED = Path(__file__).parent / "weights"
# By the field that Hugging Face's config.json names a tokenizer with.
TOKENIZERS = {"ByT5Tokenizer": ByteTokenizer}

# An embedding depends on the shape of the program that computed it, in the last bits. So a shape
# depends on the caption alone: its length rounded up to a bucket, in a batch that is always full.
BUCKET = 64
BATCH = 32


class TextEncoder:
    """A frozen T5 encoder with its tokenizer; `load_encoder` makes one.

    Attributes:
        dim: width of an embedding.
        max_tokens: the longest caption taken, in tokens, its end-of-sequence token included.
        identity: what an embedding depends on besides its caption, JSON-able: stored with
            embeddings computed ahead, and compared before they are used.
    """

    def __init__(self, t5: T5Encoder, tokenizer: ByteTokenizer, max_tokens: int, identity: dict):
        self.dim = t5.config.d_model
        self.max_tokens = max_tokens
        self.identity = identity
        self._tokenizer = tokenizer
        graphdef, self._weights = nnx.split(t5)

        @jax.jit
        def apply(weights, ids_bt, mask_bt):
            # By default TPUs multiply float32 in bfloat16 and GPUs in TF32; embeddings computed
            # once on one machine and sampled with on another have to agree.
            with jax.default_matmul_precision("highest"):
                return nnx.merge(graphdef, weights)(ids_bt, mask_bt).astype(jnp.bfloat16)

        self._apply = apply

    def num_tokens(self, caption: str) -> int:
        """How many tokens `caption` has, its end-of-sequence token included."""
        return len(self._tokenizer.encode(caption))

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
        buckets = defaultdict(list)
        distinct = dict.fromkeys(captions)
        for caption in distinct:
            ids = self._checked_ids(caption)
            buckets[-(-len(ids) // BUCKET) * BUCKET].append((caption, ids))
        embeddings: dict[str, np.ndarray] = {}
        for length, rows in sorted(buckets.items()):
            for start in range(0, len(rows), BATCH):
                batch = rows[start : start + BATCH]
                embeddings.update(self._encode_batch(batch, length))
                if progress is not None:
                    progress(len(embeddings), len(distinct))
        return [embeddings[caption] for caption in captions]

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
        ids_bt = np.full((BATCH, length), PAD_ID, np.int32)
        mask_bt = np.zeros((BATCH, length), bool)
        for row, (_, ids) in enumerate(batch):
            ids_bt[row, : len(ids)] = ids
            mask_bt[row, : len(ids)] = True
        out_btd = np.asarray(self._apply(self._weights, ids_bt, mask_bt))
        # Copies, because a view would keep its whole padded batch in memory.
        return {c: out_btd[row, : len(ids)].copy() for row, (c, ids) in enumerate(batch)}


def load_encoder(
    name_or_path: str | os.PathLike = "byte-tiny", max_tokens: int = 192
) -> TextEncoder:
    """A frozen encoder by the name of a bundled one, or from a folder that `load_t5` reads.

    Raises:
        UserError: no such encoder, an incomplete folder, an unknown tokenizer, max_tokens < 1.
    """
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; it must be at least 1")
    bundled = sorted(path.name for path in BUNDLED.iterdir())
    folder = BUNDLED / name_or_path if name_or_path in bundled else Path(name_or_path)
    if not folder.is_dir():
        raise UserError(
            f"text encoder {str(name_or_path)!r}: neither a folder nor one of {', '.join(bundled)}"
        )
    tokenizer_class = read_config(folder).get("tokenizer_class")
    if tokenizer_class not in TOKENIZERS:
        raise UserError(
            f"text encoder {str(name_or_path)!r}: tokenizer_class in config.json is "
            f"{tokenizer_class!r}; supported: {', '.join(TOKENIZERS)}"
        )
    tokenizer = TOKENIZERS[tokenizer_class]()
    t5 = load_t5(folder)
    identity = {
        "encoder": folder.name,
        "weights_sha256": _sha256(folder / WEIGHTS_FILE),
        "tokenizer": tokenizer.name,
        "max_tokens": max_tokens,
        "dim": t5.config.d_model,
        "dtype": np.dtype(ml_dtypes.bfloat16).name,
    }
    return TextEncoder(t5, tokenizer, max_tokens, identity)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
