"""Classifier-free guidance: a conditional and an unconditional output become one x_hat."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.conditioning import drop_text
from imagen_jax.diffusion.process import Cond, Denoiser, Prediction, scaled_input


def both_conds(cond: Cond) -> tuple[Cond, Cond]:
    """What the conditional and the unconditional pass are told.

    The latter's prompt is the null prompt, or the negative one if cond has it: negative_text
    [B, T, D] and negative_text_mask bool [B, T], shaped as text and text_mask.
    """
    told = {k: v for k, v in cond.items() if not k.startswith("negative_")}
    if "negative_text" not in cond:
        return told, drop_text(told, jnp.ones(told["text_mask"].shape[:1], bool))
    names = ("text", "text_mask")
    return told, told | {name: cond[f"negative_{name}"] for name in names}


def both_outputs(
    denoise: Denoiser, z: jax.Array, log_snr: jax.Array, cond: Cond, batched: bool
) -> tuple[jax.Array, jax.Array]:
    """The conditional and the unconditional output, float32: one batch of 2B, or one after another.

    One after another takes the memory of B examples, and about the same time where B fills the
    device.
    """
    batch, told, untold = z.shape[0], *both_conds(cond)
    if batched:
        # A sample's two passes sit side by side, so that a sharded batch doubles where it lies.
        def pair(a, b):
            return jnp.stack([a, b], axis=1).reshape(2 * batch, *a.shape[1:])

        z2, cond2 = jax.tree.map(pair, (z, told), (z, untold))
        output = denoise(z2, jnp.full((2 * batch,), log_snr), cond2).astype(jnp.float32)
        output = output.reshape(batch, 2, *z.shape[1:])
        return output[:, 0], output[:, 1]

    def one(cond):
        return denoise(z, jnp.full((batch,), log_snr), cond).astype(jnp.float32)

    # A loop, and not two calls, which the compiler would be free to run at the same time.
    conditional, unconditional = jax.lax.map(
        one, jax.tree.map(lambda *c: jnp.stack(c), told, untold)
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
    """w f(z, c) + (1 - w) f(z) (Eq. 2) on the raw output, and f(z, c) itself; float32 [B, H, W, C].

    Given z, the outputs of every prediction are affine functions of one another and the two weights
    sum to 1, so guiding any of them is guiding eps. With an interval (low, high) of log-SNR, w is 1
    outside it (arXiv:2404.07724). A weight of 1 everywhere costs the conditional pass only.
    log_snr: scalar; cond as for `both_conds`.
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
    """x_hat scaled towards the standard deviation of the conditional x_hat, per sample.

    strength 0 leaves it, 1 goes all the way. Source: arXiv:2305.08891, section 3.4, which scales
    the raw output v; on x_hat it means the same for every prediction, and it does not change how
    much noise is taken out of z where there is little else in it.
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
    """x_hat of the guided output, rescaled; arguments as for `guided_output` and `rescale`."""
    network = scaled_input(denoise, prediction)
    outputs = guided_output(network, z, log_snr, cond, weight, interval, batched)
    x_hat, conditional = (prediction.to_x_eps(output, z, log_snr)[0] for output in outputs)
    return rescale(x_hat, conditional, rescaling) if rescaling else x_hat
