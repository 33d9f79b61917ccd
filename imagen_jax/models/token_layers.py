"""Layers of the transformer: positions, normalization, modulation, MLP. Tokens are [B, S, C]."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from imagen_jax.models.layers import dropout, sinusoidal_embedding, zeros_init
from imagen_jax.models.products import Linear


def _rows_and_columns(height: int, width: int) -> jax.Array:
    """Returns the row and the column of each patch, float32 [2, height * width]."""
    return jnp.indices((height, width), dtype=jnp.float32).reshape(2, -1)


def absolute_positions(height: int, width: int, channels: int) -> jax.Array:
    """Embeds rows in half of the channels and columns in the other, float32 [H * W, channels]."""
    parts = [sinusoidal_embedding(p, channels // 2) for p in _rows_and_columns(height, width)]
    return jnp.concatenate(parts, axis=-1)


def rotations(height: int, width: int, head_dim: int) -> jax.Array:
    """Returns the rotation of each patch, float32 [H * W, 2, head_dim]; `rotate` applies it.

    The two rows are cosines and signed sines of head_dim / 2 angles. Half of the angles grow with
    the row of the patch and half with its column (arXiv:2403.13298), so products of rotated queries
    and keys depend on the distance of their patches along both axes.
    """
    count = head_dim // 4
    freqs = 10_000.0 ** (-jnp.arange(count, dtype=jnp.float32) / count)
    angles = [p[:, None] * freqs[None, :] for p in _rows_and_columns(height, width)]
    cos, sin = (f(jnp.concatenate(angles, axis=-1)) for f in (jnp.cos, jnp.sin))
    return jnp.stack([jnp.tile(cos, 2), jnp.concatenate([-sin, sin], axis=-1)], axis=1)


def no_rotations(count: int, head_dim: int) -> jax.Array:
    """Returns the rotation by 0 of `count` tokens without a position, [count, 2, head_dim]."""
    one = jnp.ones((count, head_dim))
    return jnp.stack([one, jnp.zeros_like(one)], axis=1)


def rotate(x_bshd: jax.Array, rotation_bs2d: jax.Array) -> jax.Array:
    """Rotates channels i and i + d/2 of every head together, by angle i of the token; float32.

    To roll the channels of a head costs a TPU less than to split and concatenate its halves, which
    makes a training step an eighth longer.
    """
    cos, sin = rotation_bs2d[:, :, None, 0], rotation_bs2d[:, :, None, 1]
    x = x_bshd.astype(jnp.float32)
    return x * cos + jnp.roll(x, x.shape[-1] // 2, axis=-1) * sin


def product(linear: nnx.Linear, x: jax.Array) -> jax.Array:
    """Returns linear(x), named for the policies that save matrix products."""
    return checkpoint_name(linear(x), "product")


class RMSNorm(nnx.Module):
    """Division by the root mean square of the last axis, then a learned scale, in float32."""

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.astype(jnp.float32)
        mean_square = checkpoint_name(jnp.square(x).mean(-1, keepdims=True), "statistics")
        scale = jnp.expand_dims(self.scale[...], range(x.ndim - 1))
        return x * jax.lax.rsqrt(mean_square + 1e-6) * scale


class Modulation(nnx.Module):
    """`count` vectors per example from its embedding, zero at the start (adaLN-zero)."""

    def __init__(self, count: int, emb_width: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.count = count
        kw = {"kernel_init": zeros_init, "dtype": dtype, "rngs": rngs}
        self.linear = Linear(emb_width, count * width, **kw)

    def __call__(self, emb_be: jax.Array) -> list[jax.Array]:
        """Returns the vectors, float32 [B, 1, width] each."""
        out = product(self.linear, jax.nn.silu(emb_be)).astype(jnp.float32)[:, None, :]
        return jnp.split(out, self.count, axis=-1)


def modulated(norm: RMSNorm, h_bsc: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Returns norm(h) (1 + scale) + shift, in the type of h."""
    return (norm(h_bsc) * (1.0 + scale) + shift).astype(h_bsc.dtype)


class MLP(nnx.Module):
    """SwiGLU (arXiv:2002.05202): silu(gate(x)) * up(x), then down."""

    def __init__(self, width: int, hidden: int, dropout_rate: float, *, dtype: Any, rngs: nnx.Rngs):
        kw = {"dtype": dtype, "rngs": rngs}
        self.dropout_rate = dropout_rate
        self.gate, self.up = (Linear(width, hidden, **kw) for _ in range(2))
        self.down = Linear(hidden, width, **kw)

    def __call__(self, x_bsc: jax.Array, key: jax.Array | None) -> jax.Array:
        h = jax.nn.silu(product(self.gate, x_bsc)) * product(self.up, x_bsc)
        return product(self.down, dropout(h, self.dropout_rate, key))
