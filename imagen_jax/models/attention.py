"""Attention that does not store its logits.

At 32x32 pixels, 16 heads and 8 examples, the base model's logits take 600 MB in float32, and a
softmax that writes them to memory reads them several times. Training therefore computes the logits
twice, once for the maximum of each row and once for the exponentials (and again twice if the block
is recomputed). Only two arrays of this size are stored, both in the type of the activations: the
exponentials and, in the backward pass, the gradient of the logits.
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
    """Computes softmax(q k^T / sqrt(d)) v per head, [B, S, heads, d].

    The softmax and its sums are in float32. q, k and v must share a dtype, which the output and the
    gradients also have. Keys with a False mask are ignored; if all are False, the output is zero.
    """
    return _forward(q_bshd, k_bthd, v_bthd, mask_bt, twice=False)[0]


def _logits(q: jax.Array, k: jax.Array, mask: jax.Array | None) -> jax.Array:
    logits = jnp.einsum("bshd,bthd->bhst", q, k, preferred_element_type=jnp.float32)
    logits *= q.shape[-1] ** -0.5
    return logits if mask is None else jnp.where(mask[:, None, None, :], logits, MASKED)


def _forward(q, k, v, mask, twice=True):
    logits = _logits(q, k, mask)
    # Shares the output's checkpoint name, so a policy that saves attention saves this too.
    largest = checkpoint_name(jnp.maximum(logits.max(-1), MASKED / 2), "attention")
    if twice:
        # The barrier stops XLA from merging the two computations, which would store the logits.
        q_again, largest = jax.lax.optimization_barrier((q, largest))
        logits = _logits(q_again, k, mask)
    weights = jnp.exp(logits - largest[..., None])
    # The largest weight is about 1 unless every key is masked, so 0.5 only guards that case.
    total = checkpoint_name(jnp.maximum(weights.sum(-1), 0.5), "attention")
    total_bsh1 = total.transpose(0, 2, 1)[..., None]
    weights = weights.astype(q.dtype)
    out = jnp.einsum("bhst,bthd->bshd", weights, v, preferred_element_type=jnp.float32)
    out = checkpoint_name((out / total_bsh1).astype(q.dtype), "attention")
    return out, (q, k, v, weights, total_bsh1, out)


def _backward(residuals, g_bshd):
    """Computes dL/dlogits = p (g v^T - sum(g out)), p the softmax.

    Source: arXiv:2205.14135, appendix B.2.
    """
    q, k, v, weights, total_bsh1, out = residuals
    g = (g_bshd.astype(jnp.float32) / total_bsh1).astype(q.dtype)
    # Uses the rounded g, like the product below; otherwise the two terms would not cancel.
    mean = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).transpose(0, 2, 1)[..., None]
    dv = jnp.einsum("bhst,bshd->bthd", weights, g)
    dweights = jnp.einsum("bshd,bthd->bhst", g, v, preferred_element_type=jnp.float32)
    dlogits = (weights.astype(jnp.float32) * (dweights - mean)).astype(q.dtype)
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    dq = jnp.einsum("bhst,bthd->bshd", dlogits, k) * scale
    dk = jnp.einsum("bhst,bshd->bthd", dlogits, q) * scale
    return dq, dk, dv, None


attention.defvjp(_forward, _backward)
