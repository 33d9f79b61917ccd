"""How a byte-level encoder learns from text alone to be read by linear maps.

A diffusion model reads its text through projections and attention, so that is what is asked for:
linear heads on the output at every byte name the word it is in, masked or not, and tell what the
text says. An objective with a decoder (T5's span corruption, arXiv:1910.10683) is satisfied with
features that only a decoder can untangle. Masking is BERT's, in whole words (arXiv:1810.04805).
The heads exist for this objective only; no file keeps them.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from imagen_jax.text.t5 import T5Config, T5Encoder
from imagen_jax.text.tokenizer import PAD_ID

MASK_RATE = 0.15
WORD_BUCKETS = 2048
UNKNOWN = -1  # as a label: not to be predicted
MASKED_WEIGHT = 0.2  # at 1, and the rest at 0.2, little of the rest was learned


class Batch(NamedTuple):
    """Texts of one padded length, and what is to be told of them.

    Attributes:
        ids: int [B, T], masked words replaced.
        words: int [B, T], the bucket of the word that a byte is in; UNKNOWN between words.
        masked: bool [B, T], True within words that are masked.
        facts: int [B, T, F], whether each holds, 1 or 0, or UNKNOWN.
    """

    ids: np.ndarray
    words: np.ndarray
    masked: np.ndarray
    facts: np.ndarray


def word_buckets(text: str) -> np.ndarray:
    """The bucket of the word that each byte of `text` is in; int [num_bytes].

    Words are hashed without regard to case, so there is a bucket for any word of any language.
    """
    encoded = text.encode()
    buckets = np.full(len(encoded), UNKNOWN, np.int32)
    for word in re.finditer(rb"[\w\x80-\xff]+", encoded):
        buckets[slice(*word.span())] = zlib.crc32(word[0].lower()) % WORD_BUCKETS
    return buckets


def choose_masked(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """bool [n]: each word whole or not at all, at MASK_RATE; at least one, if there is any."""
    starts = words != np.concatenate([[UNKNOWN], words[:-1]])
    number = np.cumsum(starts)  # of the run of equal labels that a byte is in
    runs = np.unique(number[words != UNKNOWN])
    if not len(runs):
        return np.zeros(len(words), bool)
    chosen = runs[rng.random(len(runs)) < MASK_RATE]
    if not len(chosen):
        chosen = rng.choice(runs, 1)
    return np.isin(number, chosen) & (words != UNKNOWN)


class TextReader(nnx.Module):
    """An encoder, and linear heads that read words and facts at each of its tokens."""

    def __init__(self, config: T5Config, num_facts: int, *, rngs: nnx.Rngs):
        self.encoder = T5Encoder(config, rngs=rngs)
        self.words = nnx.Linear(config.d_model, WORD_BUCKETS, rngs=rngs)
        self.facts = nnx.Linear(config.d_model, num_facts, rngs=rngs)

    def __call__(self, ids_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits of words, [B, T, WORD_BUCKETS], and of facts, [B, T, F]."""
        features_btd = self.encoder(ids_bt, ids_bt != PAD_ID)
        features_nd = features_btd.reshape(-1, features_btd.shape[-1])
        words_nw, facts_nf = self.words(features_nd), self.facts(features_nd)
        return words_nw.reshape(*ids_bt.shape, -1), facts_nf.reshape(*ids_bt.shape, -1)


def reading_loss(model: TextReader, batch: Batch) -> jax.Array:
    """Cross-entropy of a byte's word, masked or not, and of its facts together; nats a byte."""
    words_btw, facts_btf = model(batch.ids)
    known_bt = batch.words != UNKNOWN
    words_bt = optax.softmax_cross_entropy_with_integer_labels(
        words_btw, jnp.where(known_bt, batch.words, 0)
    )
    facts_btf = optax.sigmoid_binary_cross_entropy(facts_btf, jnp.maximum(batch.facts, 0))
    facts_bt = facts_btf.sum(-1, where=batch.facts != UNKNOWN)
    return (
        MASKED_WEIGHT * _mean(words_bt, batch.masked)
        + _mean(words_bt, known_bt & ~batch.masked)
        + _mean(facts_bt, batch.ids != PAD_ID)
    )


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """0 where there is nothing to average."""
    return jnp.sum(x, where=where) / jnp.maximum(jnp.sum(where), 1)


def unit_scale(encoder: T5Encoder, texts: Iterable[np.ndarray]) -> None:
    """Sets the scale of the final norm so that every feature has a root mean square of 1.

    Nothing in the objective asks for a scale, and a network that is to read the features learns
    little from those that come out a tenth the size of others.

    Args:
        texts: int [n] each, ids of texts like those to be encoded.
    """
    apply = nnx.jit(lambda encoder, ids_1t: encoder(ids_1t, ids_1t != PAD_ID))
    squares, count = 0.0, 0
    for ids in texts:
        padded = np.pad(ids, (0, -len(ids) % 64), constant_values=PAD_ID)
        features_td = np.asarray(apply(encoder, padded[None]))[0, : len(ids)]
        squares, count = squares + np.square(features_td).sum(0), count + len(ids)
    scale = encoder.final_norm.scale
    scale[...] = scale[...] / np.sqrt(squares / count)
