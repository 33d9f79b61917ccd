"""Attention that keeps no logits.

At 32x32 pixels, 16 heads and 8 examples the base model's logits are 600 MB in float32, and a
softmax that writes them down goes over them again and again. Training therefore computes them
twice, once for each row's maximum and once for its exponentials (where all is recomputed, as often
again), and two arrays of their size are kept, in the type of the activations: the exponentials, and
in the backward pass the gradient of the logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

MASKED = -0.7 * jnp.finfo(jnp.float32).max


@jax.custom_vjp
def attention(
    q_bshd: jax.Array, k_bthd: jax.Array, v_bthd: jax.Array, mask_bt: jax.Array | None = None
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v for each head, [B, S, heads, d]; softmax and sums in float32.

    q, k and v are of one dtype, as are the output and the gradients.
    Keys where the mask is False are ignored; where none is True the output is zero.
    """
    return _forward(q_bshd, k_bthd, v_bthd, mask_bt, twice=False)[0]


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    logits *= q.shape[-1] ** -0.5
    return logits if mask is None else jnp.where(mask[:, None, None, :], logits, MASKED)


def _forward(q, k, v, mask, twice=True):
    logits = _logits(q, k, mask)
    # Of its name, as the output: a policy that keeps attention need not look for them again.
    largest = checkpoint_name(jnp.maximum(logits.max(-1), MASKED / 2), "attention")
    if twice:
        # Behind this barrier the same logits are others, or XLA would keep them.
        q_again, largest = jax.lax.optimization_barrier((q, largest))
        logits = _logits(q_again, k, mask)
    weights = jnp.exp(logits - largest[..., None])
    # The largest weight is about 1, unless there is no key.
    total = checkpoint_name(jnp.maximum(weights.sum(-1), 0.5), "attention")
    total_bsh1 = total.transpose(0, 2, 1)[..., None]
    weights = weights.astype(q.dtype)
    out = jnp.einsum("bhst,bthd->bshd", weights, v, preferred_element_type=jnp.float32)
    out = checkpoint_name((out / total_bsh1).astype(q.dtype), "attention")
    return out, (q, k, v, weights, total_bsh1, out)


def _backward(kept, g_bshd):
    """With p the softmax, dL/dlogits = p (g v^T - sum(g out)): arXiv:2205.14135, appendix B.2."""
    q, k, v, weights, total_bsh1, out = kept
    g = (g_bshd.astype(jnp.float32) / total_bsh1).astype(q.dtype)
    # Of the rounded g, as the product below, or the two would not cancel.
    mean = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)[..., None]
    dv = jnp.einsum("bhst,bshd->bthd", weights, g)
    dweights = jnp.einsum("bshd,bthd->bhst", g, v, preferred_element_type=jnp.float32)
    dlogits = (weights.astype(jnp.float32) * (dweights - mean)).astype(q.dtype)
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    dq = jnp.einsum("bhst,bthd->bshd", dlogits, k) * scale
    dk = jnp.einsum("bhst,bshd->bthd", dlogits, q) * scale
    return dq, dk, dv, None


attention.defvjp(_forward, _backward)
