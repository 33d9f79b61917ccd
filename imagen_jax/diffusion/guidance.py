"""Classifier-free guidance: combines a conditional and an unconditional output (section 2.2)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.conditioning import drop_text
from imagen_jax.diffusion.process import Cond, Denoiser, Prediction, scaled_input


def both_conds(cond: Cond) -> tuple[Cond, Cond]:
    """Returns the conditioning of the conditional and of the unconditional pass.

    The unconditional pass reads the null prompt, or the negative prompt if cond has one:
    negative_text [B, T, D] and negative_text_mask bool [B, T], shaped as text and text_mask.
    """
    positive = {k: v for k, v in cond.items() if not k.startswith("negative_")}
    if "negative_text" not in cond:
        return positive, drop_text(positive, jnp.ones(positive["text_mask"].shape[:1], bool))
    names = ("text", "text_mask")
    return positive, positive | {name: cond[f"negative_{name}"] for name in names}


def both_outputs(
    denoise: Denoiser, z: jax.Array, log_snr: jax.Array, cond: Cond, batched: bool
) -> tuple[jax.Array, jax.Array]:
    """Returns the conditional and the unconditional output, float32 [B, H, W, C] each.

    Args:
      log_snr: scalar.
      cond: as for `both_conds`.
      batched: evaluate one batch of 2B, or else two batches of B one after the other. The latter
        needs only the memory of B examples, and takes about as long if B examples fill the device.
    """
    batch = z.shape[0]
    cond, uncond = both_conds(cond)
    if batched:
        # The two passes of a sample are adjacent, so doubling a sharded batch moves no data.
        def pair(a, b):
            return jnp.stack([a, b], axis=1).reshape(2 * batch, *a.shape[1:])

        z2, cond2 = jax.tree.map(pair, (z, cond), (z, uncond))
        output = denoise(z2, jnp.full((2 * batch,), log_snr), cond2).astype(jnp.float32)
        output = output.reshape(batch, 2, *z.shape[1:])
        return output[:, 0], output[:, 1]

    def one(cond):
        return denoise(z, jnp.full((batch,), log_snr), cond).astype(jnp.float32)

    # A loop, because the compiler could run two separate calls at the same time.
    conditional, unconditional = jax.lax.map(
        one, jax.tree.map(lambda *c: jnp.stack(c), cond, uncond)
    )
    return conditional, unconditional


def guided_output(
    denoise: Denoiser,
    z: jax.Array,
    log_snr: jax.Array,
    cond: Cond,
    weight: float,
    interval: tuple[float, ...] | None = None,
    batched: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Returns w f(z, c) + (1 - w) f(z), Eq. 2 on the raw output, and f(z, c); float32 [B, H, W, C].

    Guiding the output of any prediction is the same as guiding eps: at a given z each is an affine
    function of eps, and the two weights sum to 1.

    Args:
      log_snr: scalar.
      cond: as for `both_conds`.
      weight: w. A weight of 1 evaluates the conditional pass only.
      interval: (low, high) in log-SNR outside which w is 1 (arXiv:2404.07724).
      batched: as for `both_outputs`.
    """
    if weight == 1:
        log_snr_b = jnp.full((z.shape[0],), log_snr)
        output = denoise(z, log_snr_b, both_conds(cond)[0]).astype(jnp.float32)
        return output, output
    conditional, unconditional = both_outputs(denoise, z, log_snr, cond, batched)
    if interval is not None:
        low, high = interval
        weight = jnp.where((low <= log_snr) & (log_snr <= high), weight, 1.0)
    return weight * conditional + (1 - weight) * unconditional, conditional


def rescale(x_hat: jax.Array, conditional: jax.Array, strength: float) -> jax.Array:
    """Scales x_hat towards the standard deviation of the conditional x_hat, per sample.

    Source: arXiv:2305.08891, section 3.4, which rescales the raw output v. Rescaling x_hat instead
    means the same for every prediction. It also leaves the amount of noise removed from z unchanged
    at low SNR, where z is almost all noise.

    Args:
      x_hat, conditional: [B, H, W, C].
      strength: 0 leaves x_hat unchanged, 1 matches the standard deviation.
    """
    axes = tuple(range(1, x_hat.ndim))
    std = jnp.maximum(x_hat.std(axis=axes, keepdims=True), jnp.finfo(x_hat.dtype).tiny)
    ratio = conditional.std(axis=axes, keepdims=True) / std
    return x_hat * (1 + strength * (ratio - 1))


def guided_x_hat(
    denoise: Denoiser,
    prediction: Prediction,
    z: jax.Array,
    log_snr: jax.Array,
    cond: Cond,
    *,
    weight: float,
    interval: tuple[float, ...] | None = None,
    rescaling: float = 0.0,
    batched: bool = True,
) -> jax.Array:
    """Returns the guided and rescaled x_hat; arguments as for `guided_output` and `rescale`."""
    network = scaled_input(denoise, prediction)
    outputs = guided_output(network, z, log_snr, cond, weight, interval, batched)
    x_hat, conditional = (prediction.to_x_eps(output, z, log_snr)[0] for output in outputs)
    return rescale(x_hat, conditional, rescaling) if rescaling else x_hat
