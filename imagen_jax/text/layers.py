"""Layers shared by BERT and CLIP: scaled attention with biases, LayerNorm, feed-forward."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

MASKED = -1e30  # exp() of it is exactly 0 in float32; every row has at least one real token

# Keyed by their name in Hugging Face's config.json.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
}


def layer_norm(dim: int, epsilon: float, *, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Builds a LayerNorm with the variance of centered values, which the trained weights expect."""
    return nnx.LayerNorm(dim, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class SelfAttention(nnx.Module):
    """Multi-head self-attention, scaled by 1/sqrt(head width), with biases on all projections."""

    def __init__(self, dim: int, num_heads: int, *, rngs: nnx.Rngs):
        self.num_heads = num_heads
        self.query = nnx.Linear(dim, dim, rngs=rngs)
        self.key = nnx.Linear(dim, dim, rngs=rngs)
        self.value = nnx.Linear(dim, dim, rngs=rngs)
        self.out = nnx.Linear(dim, dim, rngs=rngs)

    def __call__(self, x_btd: jax.Array, bias_b1tt: jax.Array) -> jax.Array:
        """Attends where `bias_b1tt` is 0, not where it is MASKED. Its third axis may be 1."""

        def heads(y):
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q_bthk, k_bshk = heads(self.query(x_btd)), heads(self.key(x_btd))
        logits_bhts = jnp.einsum("bthk,bshk->bhts", q_bthk, k_bshk) * q_bthk.shape[-1] ** -0.5
        weights_bhts = jax.nn.softmax(logits_bhts + bias_b1tt, axis=-1)
        mixed_bthk = jnp.einsum("bhts,bshk->bthk", weights_bhts, heads(self.value(x_btd)))
        return self.out(mixed_bthk.reshape(x_btd.shape))


class FeedForward(nnx.Module):
    """Two projections with biases and an activation from ACTIVATIONS between them."""

    def __init__(self, dim: int, hidden: int, activation: str, *, rngs: nnx.Rngs):
        self.up = nnx.Linear(dim, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, dim, rngs=rngs)
        self.activation = activation

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        return self.down(ACTIVATIONS[self.activation](self.up(x_btd)))
