"""Sampling: thresholding, the grid of noise levels, and the scan over steps (appendix A).

Each evaluation converts the guided output of the denoiser to x_hat and thresholds x_hat. The solver
then moves z_t to z_s, s < t, using the eps_hat implied by z_t and the thresholded x_hat. Solvers,
spacings and thresholds are tables from name to function.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

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
    """Returns x_hat unchanged."""
    return x_hat


def static_threshold(x_hat: jax.Array, percentile: float) -> jax.Array:
    """Clips x_hat to [-1, 1] (section 2.3)."""
    return jnp.clip(x_hat, -1, 1)


def dynamic_threshold(x_hat: jax.Array, percentile: float) -> jax.Array:
    """Clips x_hat to [-s, s] and divides by s = max(1, percentile of |x_hat|), per sample.

    Source: section 2.3. The paper's percentile is 99.5 (figure A.10).
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

# Spacing of the num_steps + 1 log-SNRs from t = start to t = 0: (schedule, start, num_steps).


def uniform_in_t(schedule: Schedule, start: float, num_steps: int) -> jax.Array:
    """Spaces steps uniformly in t, as in the paper (appendix A)."""
    return schedule.log_snr(jnp.linspace(start, 0, num_steps + 1))


def uniform_in_log_snr(schedule: Schedule, start: float, num_steps: int) -> jax.Array:
    """Spaces steps uniformly in log-SNR (arXiv:2206.00927): sigma / alpha shrinks geometrically."""
    first, last = schedule.log_snr(jnp.array([start, 0.0]))
    return jnp.linspace(first, last, num_steps + 1)


SPACINGS: dict[str, Callable[[Schedule, float, int], jax.Array]] = {
    "t": uniform_in_t,
    "log_snr": uniform_in_log_snr,
}


@dataclasses.dataclass(frozen=True)
class SamplerConfig:
    """Config section `sampling`; static under jit. Raises UserError if a value is out of range.

    Attributes:
      name: a key of solvers.SOLVERS.
      num_steps: number of solver steps. Each evaluates the (guided) denoiser once; "heun"
        evaluates it twice except at the first and the last step, 2 num_steps - 2 times in all.
      spacing: a key of SPACINGS: steps are uniform in "t" or "log_snr". With 64 steps or fewer, use
        "log_snr" and the solver "dpmpp_2m".
      gamma: variance of the ancestral sampler, 0 to 1; the default is this project's choice.
      variance: how gamma interpolates the variance, a key of solvers.VARIANCES.
      guidance_weight: 1 is no guidance, 0 ignores the prompt.
      guidance_interval: (low, high) in log-SNR outside which the weight is 1; None for no bounds.
      guidance_rescale: 0 to 1, how far to restore the contrast of the conditional x_hat.
      guidance_batched: evaluate both passes in one batch, or else one after the other in half the
        memory.
      threshold: thresholding of x_hat, a key of THRESHOLDS.
      threshold_percentile: percentile of |x_hat| for dynamic thresholding.
      aug_level: noise level of the low-resolution image, 0 to 1; super-resolution stages only.
      strength: image to image: fraction of the diffusion to run, above 0 up to 1; 1 keeps nothing
        of the image.
      resample: inpainting: number of times each step is taken.
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


Step = Callable[[Any, Any], Any]  # (carry, times of one evaluation) -> carry
Loop = Callable[[Step, Any, Any], Any]  # (step, carry, times of all evaluations) -> carry


def scan(step: Step, carry: Any, times: Any) -> Any:
    """Runs every evaluation in one program: the loop of ordinary sampling."""
    return jax.lax.scan(lambda carry, now: (step(carry, now), None), carry, times)[0]


def integrate(
    denoise: Denoiser,
    prediction: str,
    config: SamplerConfig,
    log_snr: jax.Array,
    z: jax.Array,
    noise: NoiseStream,
    cond: Cond,
    repeats: int = 1,
    prepare: Callable[..., jax.Array] | None = None,
    loop: Loop = scan,
) -> jax.Array:
    """Integrates from z at log_snr[0] along the grid of log-SNRs and returns the last x_hat.

    Args:
      denoise, prediction, config, cond: as for `sample`.
      log_snr: increasing, [num_steps + 1].
      z: float32 [B, H, W, C].
      noise: noise of the steps; evaluation i uses noise(i), i from 1.
      repeats: number of times each step is taken. If above 1, `prepare` must move z back to the
        start of the step.
      prepare: (i, z, log_snr_z, log_snr_t) -> z_t, called before each evaluation with z at
        log_snr_z; returns z at log_snr_t. By default z is used as it is.
      loop: runs the evaluations; another loop may run a part of them, see pipeline.stepping.
    """
    prediction_entry = lookup(PREDICTIONS, "diffusion.prediction", prediction)
    solver, threshold = SOLVERS[config.name], THRESHOLDS[config.threshold]

    def step(carry, inputs):
        state, z, log_snr_z, _ = carry
        i, log_snr_t, log_snr_s = inputs

        def step_noise(small, large):
            return jnp.sqrt(VARIANCES[config.variance](small, large, config.gamma)) * noise(i)

        z_t = prepare(i, z, log_snr_z, log_snr_t) if prepare else z
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
        return state, z_s, log_snr_s, x_hat

    log_snr_t, log_snr_s = evaluations(log_snr, solver.corrects, repeats)
    start = (solver.init(z, log_snr[0]), z, log_snr[0], jnp.zeros_like(z))
    times = (jnp.arange(1, len(log_snr_t) + 1), log_snr_t, log_snr_s)
    _, _, _, x_hat = loop(step, start, times)
    return x_hat


def sample(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    shape: tuple[int, int, int],
    cond: Cond,
    loop: Loop = scan,
) -> jax.Array:
    """Generates one sample per seed: float32 [B, *shape] in [-1, 1].

    Args:
      denoise: the network, (z, log_snr_b, cond) -> output.
      schedule: the schedule it was trained with; t runs from 1 to 0.
      prediction: what its output means, a key of process.PREDICTIONS.
      config: solver, steps, guidance and thresholding.
      seeds_b: uint32 [B]. All noise of a sample comes from its own seed, so a sample does not
        depend on its batch.
      shape: (H, W, C).
      cond: text [B, T, D] and text_mask [B, T]; for a negative prompt also negative_text and
        negative_text_mask. Other arrays, [B, ...], are passed to the denoiser unchanged.
      loop: as for `integrate`.

    Returns:
      The last x_hat, so the last step adds no noise.

    Raises:
      UserError: the prediction is unknown.
    """
    noise = functools.partial(draw_noise, seed_keys(seeds_b), shape)
    log_snr = SPACINGS[config.spacing](schedule, 1.0, config.num_steps)
    x_hat = integrate(denoise, prediction, config, log_snr, noise(0), noise, cond, loop=loop)
    return jnp.clip(x_hat, -1, 1)
