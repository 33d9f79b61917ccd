"""How a byte-level encoder learns from text alone: T5's span corruption, with a small decoder.

Sources: arXiv:1910.10683, section 3.1.4 (the objective); arXiv:2105.13626 (ByT5: bytes, mean span
20, sentinels within the vocabulary); arXiv:2205.05131 (UL2: a text's ending as its one span). The
decoder exists for this objective only; no file keeps it.
"""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from imagen_jax.text.t5 import (
    MASKED,
    Attention,
    GatedGelu,
    Linear,
    RelativeBias,
    RMSNorm,
    T5Config,
    T5Encoder,
)
from imagen_jax.text.tokenizer import EOS_ID, PAD_ID

NOISE_DENSITY = 0.15
MEAN_SPAN = 20


def corrupt_spans(
    ids: np.ndarray, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Replaces random spans of `ids` by sentinels: (what is left, what was taken).

    Args:
        ids: int [n], n >= 2, without an end-of-sequence id.
        vocab_size: sentinels count down from vocab_size - 1.

    Returns:
        inputs, each missing span one sentinel; targets, each sentinel followed by its span. Both
        end in the end-of-sequence id.
    """
    taken = _noise_mask(len(ids), rng)
    first = taken & ~np.concatenate([[False], taken[:-1]])
    starts = np.flatnonzero(first)
    sentinels = vocab_size - 1 - np.arange(len(starts))
    inputs = ids.copy()
    inputs[starts] = sentinels
    targets = np.insert(ids, starts, sentinels)[np.insert(taken, starts, True)]
    return np.append(inputs[~taken | first], EOS_ID), np.append(targets, EOS_ID)


def take_ending(ids: np.ndarray, start: int, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """As `corrupt_spans`, but the one span is all from `start` on: the text is to be continued.

    Source: the sequential denoiser of UL2 (arXiv:2205.05131, section 3.1.2).
    """
    sentinel = vocab_size - 1
    return np.append(ids[:start], [sentinel, EOS_ID]), np.concatenate(
        [[sentinel], ids[start:], [EOS_ID]]
    )


def _noise_mask(length: int, rng: np.random.Generator) -> np.ndarray:
    """True where a token is taken: T5's alternating random spans, rotated by a random amount.

    Without the rotation a short text has its one span always at its end.
    """
    num_noise = int(np.clip(round(length * NOISE_DENSITY), 1, length - 1))
    num_spans = max(1, round(num_noise / MEAN_SPAN))
    kept = _random_partition(length - num_noise, num_spans, rng)
    taken = _random_partition(num_noise, num_spans, rng)
    mask = np.repeat(np.arange(2 * num_spans) % 2 == 1, np.stack([kept, taken], axis=1).ravel())
    return np.roll(mask, rng.integers(length))


def _random_partition(total: int, parts: int, rng: np.random.Generator) -> np.ndarray:
    """`parts` positive integers that add up to `total`, each such list equally likely."""
    cuts = np.sort(rng.choice(total - 1, parts - 1, replace=False)) + 1
    return np.diff(np.concatenate([[0], cuts, [total]]))


class DecoderBlock(nnx.Module):
    """Causal self-attention, attention to the encoder, feed-forward; pre-normed residuals."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.self_norm = RMSNorm(config)
        self.self_attention = Attention(config, rngs=rngs)
        self.cross_norm = RMSNorm(config)
        self.cross_attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = GatedGelu(config, rngs=rngs)

    def __call__(self, x_bsd, self_bias_1hss, memory_btd, memory_bias_b11t):
        y_bsd = self.self_norm(x_bsd)
        x_bsd = x_bsd + self.self_attention(y_bsd, y_bsd, self_bias_1hss)
        x_bsd = x_bsd + self.cross_attention(self.cross_norm(x_bsd), memory_btd, memory_bias_b11t)
        return x_bsd + self.mlp(self.mlp_norm(x_bsd))


class SpanPredictor(nnx.Module):
    """An encoder and a decoder that together predict the spans taken out of a text."""

    def __init__(self, config: T5Config, num_decoder_layers: int, *, rngs: nnx.Rngs):
        self.encoder = T5Encoder(config, rngs=rngs)
        self.relative_bias = RelativeBias(config, bidirectional=False, rngs=rngs)
        self.blocks = nnx.List([DecoderBlock(config, rngs=rngs) for _ in range(num_decoder_layers)])
        self.final_norm = RMSNorm(config)
        self.logits = Linear(config.d_model, config.vocab_size, config.d_model**-0.5, rngs=rngs)

    def __call__(self, inputs_bt: jax.Array, targets_bs: jax.Array) -> jax.Array:
        """Logits [B, S, vocab] of each target given the inputs and the targets before it."""
        mask_bt = inputs_bt != PAD_ID
        memory_btd = self.encoder(inputs_bt, mask_bt)
        memory_bias_b11t = jnp.where(mask_bt, 0.0, MASKED)[:, None, None, :]
        length = targets_bs.shape[1]
        causal_11ss = jnp.where(jnp.tri(length, dtype=bool), 0.0, MASKED)[None, None]
        self_bias_1hss = self.relative_bias(length) + causal_11ss
        previous_bs = jnp.pad(targets_bs[:, :-1], ((0, 0), (1, 0)), constant_values=PAD_ID)
        x_bsd = self.encoder.embed(previous_bs)
        for block in self.blocks:
            x_bsd = block(x_bsd, self_bias_1hss, memory_btd, memory_bias_b11t)
        return self.logits(self.final_norm(x_bsd))


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


def span_loss(model: SpanPredictor, inputs_bt: jax.Array, targets_bs: jax.Array) -> jax.Array:
    """Mean cross-entropy of the targets, in nats a token; padding does not count."""
    logits_bsv = model(inputs_bt, targets_bs)
    loss_bs = optax.softmax_cross_entropy_with_integer_labels(logits_bsv, targets_bs)
    return jnp.mean(loss_bs, where=targets_bs != PAD_ID)
