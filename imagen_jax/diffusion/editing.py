"""Editing with a trained denoiser: image to image, inpainting, and interpolation between seeds.

All functions take the arguments of `sampler.sample`, `loop` included. As there, a sample depends
only on its own seed, image and cond.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.process import (
    Cond,
    Denoiser,
    Schedule,
    alpha_sigma,
    draw_noise,
    q_sample,
    seed_keys,
    to_float,
)
from imagen_jax.diffusion.sampler import SPACINGS, Loop, SamplerConfig, integrate, sample, scan


def image_to_image(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    image_bhwc: jax.Array,
    cond: Cond,
    loop: Loop = scan,
) -> jax.Array:
    """Samples starting from z_t ~ q(z_t | image) at t = config.strength.

    A small strength stays close to the image; 1 keeps nothing of it. All num_steps steps are
    between t = strength and 0. Source: SDEdit, arXiv:2108.01073, algorithm 1.

    Args:
      image_bhwc: in [-1, 1].

    Returns:
      float32 [B, H, W, C] in [-1, 1].
    """
    noise = functools.partial(draw_noise, seed_keys(seeds_b), image_bhwc.shape[1:])
    log_snr = SPACINGS[config.spacing](schedule, config.strength, config.num_steps)
    z = q_sample(image_bhwc, noise(0), log_snr[0])
    x_hat = integrate(denoise, prediction, config, log_snr, z, noise, cond, loop=loop)
    return jnp.clip(x_hat, -1, 1)


def q_step(z_s: jax.Array, eps: jax.Array, log_snr_s: jax.Array, log_snr_t: jax.Array) -> jax.Array:
    """Adds noise, z_t ~ q(z_t | z_s); scalar log-SNRs, log_snr_t <= log_snr_s.

    z_t = (alpha_t / alpha_s) z_s + sqrt(1 - e^{lambda_t - lambda_s}) sigma_t eps, which is z_s if
    the two log-SNRs are equal. Source: appendix A, Eq. 3.
    """
    alpha_s, _ = alpha_sigma(log_snr_s)
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    return (alpha_t / alpha_s) * z_s + jnp.sqrt(-jnp.expm1(log_snr_t - log_snr_s)) * sigma_t * eps


def inpaint(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    image_bhwc: jax.Array,
    mask_bhw1: jax.Array,
    cond: Cond,
    loop: Loop = scan,
) -> jax.Array:
    """Replaces the pixels where mask_bhw1 is True; elsewhere returns image_bhwc exactly.

    After each step the known pixels of z_s are replaced by those of the image at the same noise
    level. Each step is taken config.resample times, jumping back by q(z_t | z_s) in between, so
    that the new pixels can adapt to the known ones; the cost grows by the same factor. RePaint
    takes each step 10 times. Source: RePaint, arXiv:2201.09865, algorithm 1, with jumps of one
    step.

    Args:
      image_bhwc: in [-1, 1].
      mask_bhw1: bool, True at the pixels to replace.

    Returns:
      float32 [B, H, W, C] in [-1, 1].
    """
    resample = config.resample
    keys_b, known_keys, back_keys = (seed_keys(seeds_b, stream) for stream in range(3))
    shape = image_bhwc.shape[1:]

    def prepare(i, z_s, log_snr_s, log_snr_t):
        known = q_sample(image_bhwc, draw_noise(known_keys, shape, i), log_snr_s)
        z_s = jnp.where(mask_bhw1, z_s, known)
        if resample == 1:
            return z_s
        return q_step(z_s, draw_noise(back_keys, shape, i), log_snr_s, log_snr_t)

    noise = functools.partial(draw_noise, keys_b, shape)
    log_snr = SPACINGS[config.spacing](schedule, 1.0, config.num_steps)
    x_hat = integrate(
        denoise, prediction, config, log_snr, noise(0), noise, cond, resample, prepare, loop
    )
    return jnp.where(mask_bhw1, jnp.clip(x_hat, -1, 1), image_bhwc)


def slerp(a: jax.Array, b: jax.Array, fraction_b: jax.Array) -> jax.Array:
    """Interpolates spherically per sample: a at fraction 0, b at fraction 1 (arXiv:1609.04468).

    Unlike a linear mix, it keeps the norm of two samples of standard normal noise.

    Args:
      a, b: [B, ...].
      fraction_b: [B] in [0, 1].
    """
    axes, shape = tuple(range(1, a.ndim)), (-1,) + (1,) * (a.ndim - 1)
    norms = jnp.sqrt(jnp.sum(a**2, axes) * jnp.sum(b**2, axes))
    angle = jnp.arccos(jnp.clip(jnp.sum(a * b, axes) / norms, -1, 1))

    def weight(fraction):
        # sin(fraction angle) / sin(angle), or its limit if the angle is 0.
        ratio = jnp.sinc(fraction * angle / jnp.pi) / jnp.sinc(angle / jnp.pi)
        return (fraction * ratio).reshape(shape)

    return weight(1 - fraction_b) * a + weight(fraction_b) * b


def interpolate(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    other_seeds_b: jax.Array,
    fraction_b: jax.Array,
    shape: tuple[int, int, int],
    cond: Cond,
    loop: Loop = scan,
) -> jax.Array:
    """Interpolates between the samples of two seeds: float32 [B, *shape] in [-1, 1].

    All noise is the `slerp` of the two seeds' noise, including that of a stochastic solver's steps.

    Args:
      fraction_b: [B] in [0, 1]; 0 gives the result of `sample` for seeds_b, 1 for other_seeds_b.
    """
    keys_b, other_keys_b = seed_keys(seeds_b), seed_keys(other_seeds_b)

    def noise(i):
        return slerp(draw_noise(keys_b, shape, i), draw_noise(other_keys_b, shape, i), fraction_b)

    log_snr = SPACINGS[config.spacing](schedule, 1.0, config.num_steps)
    x_hat = integrate(denoise, prediction, config, log_snr, noise(0), noise, cond, loop=loop)
    return jnp.clip(x_hat, -1, 1)


# Keys of cond that select an edit in `sample_or_edit`; they are not passed to the denoiser.
INPUTS = ("image", "mask", "to_seed", "fraction")


def sample_or_edit(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    shape: tuple[int, int, int],
    cond: Cond,
    loop: Loop = scan,
) -> jax.Array:
    """Calls `sampler.sample`, or the edit selected by the INPUTS in cond: float32 [B, *shape].

    | keys in cond | function |
    |---|---|
    | none of INPUTS | `sample` |
    | image uint8 [B, H, W, 3] | `image_to_image` |
    | image, mask bool [B, H, W, 1] | `inpaint` |
    | to_seed uint32 [B], fraction [B] | `interpolate` |
    """
    inputs = {k: cond[k] for k in INPUTS if k in cond}
    cond = {k: v for k, v in cond.items() if k not in inputs}
    common = (denoise, schedule, prediction, config, seeds_b)
    if "to_seed" in inputs:
        return interpolate(*common, inputs["to_seed"], inputs["fraction"], shape, cond, loop)
    if "image" not in inputs:
        return sample(*common, shape, cond, loop)
    image = to_float(inputs["image"])
    if "mask" in inputs:
        return inpaint(*common, image, inputs["mask"], cond, loop)
    return image_to_image(*common, image, cond, loop)
