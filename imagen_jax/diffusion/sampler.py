"""Sampling: thresholding, the grid of times, and the scan over steps (Imagen, appendix A).

At every evaluation the denoiser's guided output becomes x_hat, x_hat is thresholded, and the solver
moves z_t to z_s, s < t, with the eps_hat that z_t and the thresholded x_hat imply. Solvers,
spacings and thresholds are tables from a name to a function.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from imagen_jax.common.typed_config import require
from imagen_jax.diffusion.guidance import guided_x_hat
from imagen_jax.diffusion.process import (
    PREDICTIONS,
    Cond,
    Denoiser,
    NoiseStream,
    Schedule,
    draw_noise,
    lookup,
    seed_keys,
)
from imagen_jax.diffusion.solvers import SOLVERS, VARIANCES, evaluations

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

# Spacing of the num_steps + 1 log-SNRs from time `start` to 0: (schedule, start, num_steps).


def uniform_in_t(schedule: Schedule, start: float, num_steps: int) -> jax.Array:
    """The paper's: the same difference of t at every step."""
    return schedule.log_snr(jnp.linspace(start, 0, num_steps + 1))


def uniform_in_log_snr(schedule: Schedule, start: float, num_steps: int) -> jax.Array:
    """The same factor of sigma / alpha at every step (arXiv:2206.00927, section 4)."""
    first, last = schedule.log_snr(jnp.array([start, 0.0]))
    return jnp.linspace(first, last, num_steps + 1)


SPACINGS: dict[str, Callable[[Schedule, float, int], jax.Array]] = {
    "t": uniform_in_t,
    "log_snr": uniform_in_log_snr,
}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Config section `sampling`; static under jit. Raises UserError for a value out of range.

    Attributes:
      name: a key of solvers.SOLVERS.
      num_steps: steps of the solver. Each evaluates the (guided) denoiser once, but for "heun",
        which does so twice at all steps but the first and the last: 2 num_steps - 2 times.
      spacing: what the times are evenly spaced in, a key of SPACINGS.
      gamma: noise of the ancestral sampler, 0 to 1; the default is this project's choice.
      variance: how gamma interpolates, a key of solvers.VARIANCES.
      guidance_weight: 1 is no guidance, 0 ignores the prompt.
      guidance_interval: (low, high) of log-SNR outside of which the weight is 1; None: no bounds.
      guidance_rescale: 0 to 1, how far x_hat gets back the conditional pass's contrast.
      guidance_batched: both passes in one batch, or one after another in half the memory.
      threshold: of x_hat, a key of THRESHOLDS.
      threshold_percentile: of |x_hat|, for the dynamic threshold.
      aug_level: noise on the image that a super-resolution stage enlarges, 0 to 1.
      strength: how much of an image to start from may change, above 0 to 1.
      resample: how often each step is taken where only a part is painted anew.
    """

    name: str = "ddim"
    num_steps: int = 256
    spacing: str = "t"
    gamma: float = 0.2
    variance: str = "geometric"
    guidance_weight: float = 1.0
    guidance_interval: tuple[float, ...] | None = None
    guidance_rescale: float = 0.0
    guidance_batched: bool = True
    threshold: str = "dynamic"
    threshold_percentile: float = 99.5
    aug_level: float = 0.1
    strength: float = 1.0
    resample: int = 1

    def __post_init__(self):
        lookup(SOLVERS, "sampling.name", self.name)
        lookup(SPACINGS, "sampling.spacing", self.spacing)
        lookup(VARIANCES, "sampling.variance", self.variance)
        lookup(THRESHOLDS, "sampling.threshold", self.threshold)
        interval = self.guidance_interval
        ordered = interval is None or (len(interval) == 2 and interval[0] < interval[1])
        checks = (
            ("num_steps", self.num_steps >= 1, "1 or more"),
            ("gamma", 0 <= self.gamma <= 1, "[0, 1]"),
            ("guidance_weight", 0 <= self.guidance_weight < math.inf, "0 or more, finite"),
            ("guidance_interval", ordered, "(low, high) with low < high, or None"),
            ("guidance_rescale", 0 <= self.guidance_rescale <= 1, "[0, 1]"),
            ("threshold_percentile", 0 < self.threshold_percentile <= 100, "(0, 100]"),
            ("aug_level", 0 <= self.aug_level <= 1, "[0, 1]"),
            ("strength", 0 < self.strength <= 1, "(0, 1]"),
            ("resample", self.resample >= 1, "1 or more"),
        )
        for key, ok, allowed in checks:
            require(ok, f"sampling.{key}", getattr(self, key), allowed)


def integrate(
    denoise: Denoiser,
    prediction: str,
    config: SamplerConfig,
    log_snr: jax.Array,
    z: jax.Array,
    noise: NoiseStream,
    cond: Cond,
    repeats: int = 1,
    enter: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Takes z, at log_snr[0], along the grid of log-SNRs, and returns the last x_hat.

    Args:
      denoise, prediction, config, cond: as for `sample`.
      log_snr: rising, [num_steps + 1].
      z: float32 [B, H, W, C].
      noise: for the steps, from 1 on.
      repeats: how often each step is taken; then `enter` has to lead back to its start.
      enter: (i, z, log_snr_z, log_snr_t) -> z_t, before each evaluation: z, which is at log_snr_z,
        is to be at log_snr_t. By default it is there already.
    """
    prediction_entry = lookup(PREDICTIONS, "diffusion.prediction", prediction)
    solver, threshold = SOLVERS[config.name], THRESHOLDS[config.threshold]

    def step(carry, inputs):
        state, z, log_snr_z, _ = carry
        i, log_snr_t, log_snr_s = inputs

        def step_noise(small, large):
            return jnp.sqrt(VARIANCES[config.variance](small, large, config.gamma)) * noise(i)

        z_t = enter(i, z, log_snr_z, log_snr_t) if enter else z
        x_hat = guided_x_hat(
            denoise,
            prediction_entry,
            z_t,
            log_snr_t,
            cond,
            weight=config.guidance_weight,
            interval=config.guidance_interval,
            rescaling=config.guidance_rescale,
            batched=config.guidance_batched,
        )
        x_hat = threshold(x_hat, config.threshold_percentile)
        state, z_s = solver.step(state, z_t, x_hat, log_snr_t, log_snr_s, step_noise)
        return (state, z_s, log_snr_s, x_hat), None

    log_snr_t, log_snr_s = evaluations(log_snr, solver.corrects, repeats)
    start = (solver.init(z, log_snr[0]), z, log_snr[0], jnp.zeros_like(z))
    times = (jnp.arange(1, len(log_snr_t) + 1), log_snr_t, log_snr_s)
    (_, _, _, x_hat), _ = jax.lax.scan(step, start, times)
    return x_hat


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

    Args:
      denoise: the network, (z, log_snr_b, cond) -> output.
      schedule: what it was trained with; times go from 1 to 0.
      prediction: a key of diffusion.PREDICTIONS, what its output means.
      config: solver, steps, guidance and thresholding.
      seeds_b: uint32 [B]; all the noise of a sample comes from its own seed, so that it does not
        depend on the batch it is drawn in.
      shape: (H, W, C).
      cond: text [B, T, D] and text_mask [B, T]; negative_text and negative_text_mask for a negative
        prompt. Other keys, of arrays [B, ...], are passed to the denoiser as they are.

    Returns:
      The last x_hat; so the last step adds no noise.

    Raises:
      UserError: an unknown prediction.
    """
    noise = functools.partial(draw_noise, seed_keys(seeds_b), shape)
    log_snr = SPACINGS[config.spacing](schedule, 1.0, config.num_steps)
    x_hat = integrate(denoise, prediction, config, log_snr, noise(0), noise, cond)
    return jnp.clip(x_hat, -1, 1)
