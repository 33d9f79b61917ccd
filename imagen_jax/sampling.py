"""Samplers: guidance, thresholding, one step, and the scan over steps (Imagen, appendix A).

At every step the denoiser's guided output becomes x_hat, x_hat is thresholded, and the step moves
z_t to z_s, s < t, with the eps_hat that z_t and the thresholded x_hat imply. Steps and thresholds
are tables from a name to a function.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from imagen_jax.config import require
from imagen_jax.diffusion import (
    PREDICTIONS,
    Cond,
    Denoiser,
    Schedule,
    alpha_sigma,
    drop_text,
    lookup,
)

# Thresholding of x_hat: (x_hat [B, ...], percentile) -> x_hat.


def no_threshold(x_hat: jax.Array, percentile: float) -> jax.Array:
    """x_hat as it is."""
    return x_hat


def static_threshold(x_hat: jax.Array, percentile: float) -> jax.Array:
    """x_hat clipped to [-1, 1]."""
    return jnp.clip(x_hat, -1, 1)


def dynamic_threshold(x_hat: jax.Array, percentile: float) -> jax.Array:
    """x_hat clipped to [-s, s] and divided by s = max(1, percentile of |x_hat|), per sample.

    Source: section 2.3; the paper's percentile is 99.5.
    """
    magnitude = jnp.abs(x_hat).reshape(x_hat.shape[0], -1)
    s_b = jnp.maximum(jnp.percentile(magnitude, percentile, axis=1), 1)
    s = s_b.reshape((-1,) + (1,) * (x_hat.ndim - 1))
    return jnp.clip(x_hat, -s, s) / s


THRESHOLDS: dict[str, Callable[[jax.Array, float], jax.Array]] = {
    "none": no_threshold,
    "static": static_threshold,
    "dynamic": dynamic_threshold,
}

# Between the two variances of the ancestral step: (small, large, gamma) -> variance.
VARIANCES: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "geometric": lambda small, large, gamma: small ** (1 - gamma) * large**gamma,
    "linear": lambda small, large, gamma: small * (1 - gamma) + large * gamma,
}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Config section `sampling`; static under jit. Raises UserError for a value out of range.

    num_steps counts evaluations of the (guided) denoiser. gamma and variance are read by the
    ancestral sampler only; gamma's default is this project's choice. guidance_weight 1 is no
    guidance.
    """

    name: str = "ddim"
    num_steps: int = 256
    gamma: float = 0.2
    variance: str = "geometric"
    guidance_weight: float = 1.0
    threshold: str = "dynamic"
    threshold_percentile: float = 99.5

    def __post_init__(self):
        lookup(STEPS, "sampling.name", self.name)
        lookup(VARIANCES, "sampling.variance", self.variance)
        lookup(THRESHOLDS, "sampling.threshold", self.threshold)
        weight, percentile = self.guidance_weight, self.threshold_percentile
        require(self.num_steps >= 1, "sampling.num_steps", self.num_steps, "1 or more")
        require(0 <= self.gamma <= 1, "sampling.gamma", self.gamma, "[0, 1]")
        require(0 <= weight < math.inf, "sampling.guidance_weight", weight, "0 or more, finite")
        require(0 < percentile <= 100, "sampling.threshold_percentile", percentile, "(0, 100]")


# Steps: (z_t, x_hat, log_snr_t, log_snr_s, noise, config) -> z_s. log_snr_t, log_snr_s: scalars.


def ddim_step(
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: jax.Array,
    config: SamplerConfig,
) -> jax.Array:
    """z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat); noise is not used."""
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    return alpha_s * x_hat + (sigma_s / sigma_t) * (z_t - alpha_t * x_hat)


def ancestral_step(
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: jax.Array,
    config: SamplerConfig,
) -> jax.Array:
    """z_s ~ N(mean of q(z_s | z_t, x_hat), variance), with r = e^{lambda_t - lambda_s}:

    mean = r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x_hat; the variance lies between
    (1 - r) sigma_s^2 (that of q(z_s | z_t, x), gamma = 0) and (1 - r) sigma_t^2 (that of
    q(z_t | z_s), gamma = 1), interpolated as config.variance says.
    """
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    r = jnp.exp(log_snr_t - log_snr_s)
    one_minus_r = -jnp.expm1(log_snr_t - log_snr_s)
    mean = r * (alpha_s / alpha_t) * z_t + one_minus_r * alpha_s * x_hat
    small, large = one_minus_r * sigma_s**2, one_minus_r * sigma_t**2
    return mean + jnp.sqrt(VARIANCES[config.variance](small, large, config.gamma)) * noise


STEPS: dict[str, Callable[..., jax.Array]] = {"ddim": ddim_step, "ancestral": ancestral_step}


def guided_output(
    denoise: Denoiser, z: jax.Array, log_snr: jax.Array, cond: Cond, guidance_weight: float
) -> jax.Array:
    """w f(z, c) + (1 - w) f(z): classifier-free guidance (Eq. 2) on the raw output.

    Given z, the outputs eps, x and v are affine functions of one another and the two weights sum to
    1, so guiding any of them is guiding eps. z: [B, H, W, C]; log_snr: scalar; cond as for
    drop_text. Both passes are one batch of 2B, or just the conditional one when w is 1.
    """
    batch = z.shape[0]
    if guidance_weight == 1:
        return denoise(z, jnp.full((batch,), log_snr), cond).astype(jnp.float32)
    # A sample's two passes sit side by side, so that a sharded batch doubles where it lies.
    z2, cond2 = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), (z, cond))
    cond2 = drop_text(cond2, jnp.tile(jnp.array([False, True]), batch))
    output2 = denoise(z2, jnp.full((2 * batch,), log_snr), cond2).astype(jnp.float32)
    output = output2.reshape(batch, 2, *z.shape[1:])
    return guidance_weight * output[:, 0] + (1 - guidance_weight) * output[:, 1]


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    shape: tuple[int, int, int],
    cond: Cond,
) -> jax.Array:
    """Draws one sample per seed: float32 [B, *shape] in [-1, 1].

    Times are num_steps + 1 points, evenly spaced from 1 to 0. seeds_b is uint32 [B]: all the noise
    of a sample comes from its own seed, so that it does not depend on the batch it is drawn in.
    The sample is the last x_hat, so the last step adds no noise. Raises UserError for an unknown
    prediction.
    """
    to_x_eps = lookup(PREDICTIONS, "diffusion.prediction", prediction).to_x_eps
    # Named, because under vmap the faster "rbg" generator does not keep each key's stream.
    key_of = functools.partial(jax.random.key, impl="threefry2x32")
    keys_b = jax.vmap(key_of)(jnp.asarray(seeds_b, jnp.uint32))

    def draw_noise(i):
        return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), shape))(keys_b)

    def step(carry, inputs):
        z_t, _ = carry
        i, log_snr_t, log_snr_s = inputs
        output = guided_output(denoise, z_t, log_snr_t, cond, config.guidance_weight)
        x_hat, _ = to_x_eps(output, z_t, log_snr_t)
        x_hat = THRESHOLDS[config.threshold](x_hat, config.threshold_percentile)
        z_s = STEPS[config.name](z_t, x_hat, log_snr_t, log_snr_s, draw_noise(i), config)
        return (z_s, x_hat), None

    log_snr = schedule.log_snr(jnp.linspace(1, 0, config.num_steps + 1))
    steps = (jnp.arange(1, config.num_steps + 1), log_snr[:-1], log_snr[1:])
    z_1 = draw_noise(0)
    (_, x_hat), _ = jax.lax.scan(step, (z_1, jnp.zeros_like(z_1)), steps)
    return jnp.clip(x_hat, -1, 1)
