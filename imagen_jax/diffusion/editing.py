"""Editing with a trained denoiser: repaint a part, start from an image, go between two seeds.

Each function takes what `sampling.sample` takes, and like there a sample depends on its own seed,
image and cond only.
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
from imagen_jax.diffusion.sampler import SPACINGS, SamplerConfig, integrate, sample


def image_to_image(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    image_bhwc: jax.Array,
    cond: Cond,
) -> jax.Array:
    """Samples from q(z_t | image) on, t = config.strength: float32 [B, H, W, C] in [-1, 1].

    image_bhwc: in [-1, 1]. A small strength keeps the image, 1 keeps nothing of it. All num_steps
    steps lie between strength and 0. Source: SDEdit, arXiv:2108.01073, algorithm 1.
    """
    noise = functools.partial(draw_noise, seed_keys(seeds_b), image_bhwc.shape[1:])
    log_snr = SPACINGS[config.spacing](schedule, config.strength, config.num_steps)
    z = q_sample(image_bhwc, noise(0), log_snr[0])
    return jnp.clip(integrate(denoise, prediction, config, log_snr, z, noise, cond), -1, 1)


def q_step(z_s: jax.Array, eps: jax.Array, log_snr_s: jax.Array, log_snr_t: jax.Array) -> jax.Array:
    """z_t ~ q(z_t | z_s), more noise on top; z_s itself where log_snr_t is log_snr_s.

    z_t = (alpha_t / alpha_s) z_s + sqrt(1 - e^{lambda_t - lambda_s}) sigma_t eps; scalar log-SNRs,
    log_snr_t <= log_snr_s. Source: appendix A.
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
) -> jax.Array:
    """Paints anew where mask_bhw1, bool, is True; elsewhere the result is image_bhwc, exactly.

    After each step the known pixels of z_s are replaced by the image's, noised to the same level.
    Each step is taken config.resample times, with a jump back by q(z_t | z_s) between: a step that
    has seen the known pixels only once cannot fit the new ones to them. Costs that many times as
    much; 10 in the paper. Returns float32 [B, H, W, C] in [-1, 1]. Source: RePaint,
    arXiv:2201.09865, algorithm 1, with jumps of one step.
    """
    resample = config.resample
    keys_b, known_keys, back_keys = (seed_keys(seeds_b, stream) for stream in range(3))
    shape = image_bhwc.shape[1:]

    def enter(i, z_s, log_snr_s, log_snr_t):
        known = q_sample(image_bhwc, draw_noise(known_keys, shape, i), log_snr_s)
        z_s = jnp.where(mask_bhw1, z_s, known)
        if resample == 1:
            return z_s
        return q_step(z_s, draw_noise(back_keys, shape, i), log_snr_s, log_snr_t)

    noise = functools.partial(draw_noise, keys_b, shape)
    log_snr = SPACINGS[config.spacing](schedule, 1.0, config.num_steps)
    x_hat = integrate(denoise, prediction, config, log_snr, noise(0), noise, cond, resample, enter)
    return jnp.where(mask_bhw1, jnp.clip(x_hat, -1, 1), image_bhwc)


def slerp(a: jax.Array, b: jax.Array, fraction_b: jax.Array) -> jax.Array:
    """From a at fraction 0 to b at 1, per sample, along the great circle between them.

    a, b: [B, ...]; fraction_b: [B]. Unlike their average, what lies between two draws of standard
    normal noise is as long as they are (arXiv:1609.04468).
    """
    axes, shape = tuple(range(1, a.ndim)), (-1,) + (1,) * (a.ndim - 1)
    norms = jnp.sqrt(jnp.sum(a**2, axes) * jnp.sum(b**2, axes))
    angle = jnp.arccos(jnp.clip(jnp.sum(a * b, axes) / norms, -1, 1))

    def weight(fraction):
        # sin(fraction angle) / sin(angle), and its limit where the angle is 0.
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
) -> jax.Array:
    """Samples between those of two seeds: float32 [B, *shape] in [-1, 1].

    fraction_b: [B] in [0, 1]; at 0 the result is that of `sample` for seeds_b, at 1 that for
    other_seeds_b. All noise, that of a stochastic solver's steps too, is the `slerp` of theirs.
    """
    keys_b, other_keys_b = seed_keys(seeds_b), seed_keys(other_seeds_b)

    def noise(i):
        return slerp(draw_noise(keys_b, shape, i), draw_noise(other_keys_b, shape, i), fraction_b)

    log_snr = SPACINGS[config.spacing](schedule, 1.0, config.num_steps)
    x_hat = integrate(denoise, prediction, config, log_snr, noise(0), noise, cond)
    return jnp.clip(x_hat, -1, 1)


# What `sample_or_edit` takes out of cond, and edits by.
INPUTS = ("image", "mask", "to_seed", "fraction")


def sample_or_edit(
    denoise: Denoiser,
    schedule: Schedule,
    prediction: str,
    config: SamplerConfig,
    seeds_b: jax.Array,
    shape: tuple[int, int, int],
    cond: Cond,
) -> jax.Array:
    """`sampling.sample`, or the edit that the INPUTS in cond ask for: float32 [B, *shape].

    image uint8 [B, H, W, 3] and mask bool [B, H, W, 1]: `inpaint`; image alone: `image_to_image`;
    to_seed uint32 [B] and fraction [B]: `interpolate`.
    """
    given = {k: cond[k] for k in INPUTS if k in cond}
    cond = {k: v for k, v in cond.items() if k not in given}
    common = (denoise, schedule, prediction, config, seeds_b)
    if "to_seed" in given:
        return interpolate(*common, given["to_seed"], given["fraction"], shape, cond)
    if "image" not in given:
        return sample(*common, shape, cond)
    image = to_float(given["image"])
    if "mask" in given:
        return inpaint(*common, image, given["mask"], cond)
    return image_to_image(*common, image, cond)
