"""Solvers: how z_t and x_hat become z_s, s < t, and at which times the denoiser is asked.

A solver sees scalars log_snr_t < log_snr_s and one x_hat an evaluation, guided and thresholded; all
else it knows is in its state. The table at the end has them by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion.process import alpha_sigma

# (small, large) -> noise of a variance between the two.
Noise = Callable[[jax.Array, jax.Array], jax.Array]


class Solver(NamedTuple):
    """One way to go from noise to data.

    init: (z, log_snr) at the first time -> state, a pytree of arrays.
    step: (state, z_t, x_hat, log_snr_t, log_snr_s, noise) -> (state, z_s).
    corrects: evaluate at z_s as well, which then calls step with log_snr_t = log_snr_s.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    step: Callable[..., tuple[Any, jax.Array]]
    corrects: bool = False


def ddim(z_t: jax.Array, x_hat: jax.Array, log_snr_t: jax.Array, log_snr_s: jax.Array) -> jax.Array:
    """z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat)."""
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    return alpha_s * x_hat + (sigma_s / sigma_t) * (z_t - alpha_t * x_hat)


def ddim_step(
    state: tuple,
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: Noise,
) -> tuple[tuple, jax.Array]:
    """First order, deterministic: `ddim`. Source: appendix A; arXiv:2010.02502."""
    return state, ddim(z_t, x_hat, log_snr_t, log_snr_s)


def ancestral_step(
    state: tuple,
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: Noise,
) -> tuple[tuple, jax.Array]:
    """z_s ~ N(mean of q(z_s | z_t, x_hat), variance), with r = e^{lambda_t - lambda_s}:

    mean = r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x_hat; the variance lies between
    (1 - r) sigma_s^2 (that of q(z_s | z_t, x), gamma = 0) and (1 - r) sigma_t^2 (that of
    q(z_t | z_s), gamma = 1). Source: appendix A.
    """
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    r = jnp.exp(log_snr_t - log_snr_s)
    one_minus_r = -jnp.expm1(log_snr_t - log_snr_s)
    mean = r * (alpha_s / alpha_t) * z_t + one_minus_r * alpha_s * x_hat
    return state, mean + noise(one_minus_r * sigma_s**2, one_minus_r * sigma_t**2)


# Between the two variances of the ancestral step: (small, large, gamma) -> variance.
VARIANCES: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "geometric": lambda small, large, gamma: small ** (1 - gamma) * large**gamma,
    "linear": lambda small, large, gamma: small * (1 - gamma) + large * gamma,
}


def dpmpp_2m_init(z: jax.Array, log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """No x_hat yet: its log-SNR stands above all."""
    return jnp.zeros_like(z), jnp.float32(jnp.inf)


def dpmpp_2m_step(
    state: tuple[jax.Array, jax.Array],
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: Noise,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """DPM-Solver++(2M), arXiv:2211.01095, algorithm 2: second order, deterministic.

    DDIM with x_hat carried on along the line through it and the one before, half a step in lambda.
    The state is the x_hat before and its log-SNR. The first step, and one after a jump back to more
    noise, has none to draw the line from and is DDIM.
    """
    x_before, log_snr_before = state
    ratio = 0.5 * (log_snr_s - log_snr_t) / (log_snr_t - log_snr_before)
    ahead = x_hat + jnp.where(log_snr_before < log_snr_t, ratio, 0) * (x_hat - x_before)
    return (x_hat, log_snr_t), ddim(z_t, ahead, log_snr_t, log_snr_s)


def heun_init(z: jax.Array, log_snr: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The start of the first step; its slope is not read."""
    return z, jnp.zeros_like(z), log_snr


def heun_step(
    state: tuple[jax.Array, jax.Array, jax.Array],
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: Noise,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Heun's method (EDM, arXiv:2206.00364, algorithm 1): second order, deterministic, no churn.

    The flow of y = z / alpha along s = sigma / alpha is dy / ds = eps_hat. A call with
    log_snr_t < log_snr_s is Euler's step, which is DDIM; the state is where it began and its slope.
    One with log_snr_t = log_snr_s, at the point it reached, repeats it with the mean of the slopes.
    """
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    here = (z_t, (z_t - alpha_t * x_hat) / sigma_t, log_snr_t)
    before = (state[0], 0.5 * (state[1] + here[1]), state[2])
    corrects = log_snr_t == log_snr_s
    z, slope, log_snr = jax.tree.map(lambda a, b: jnp.where(corrects, a, b), before, here)
    alpha, sigma = alpha_sigma(log_snr)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    ratio = alpha_s / alpha
    return (z, slope, log_snr), ratio * z + (sigma_s - ratio * sigma) * slope


def _stateless(z: jax.Array, log_snr: jax.Array) -> tuple:
    return ()


SOLVERS: dict[str, Solver] = {
    "ddim": Solver(_stateless, ddim_step),
    "ancestral": Solver(_stateless, ancestral_step),
    "dpmpp_2m": Solver(dpmpp_2m_init, dpmpp_2m_step),
    "heun": Solver(heun_init, heun_step, corrects=True),
}


def evaluations(
    log_snr: jax.Array, corrects: bool, repeats: int = 1
) -> tuple[jax.Array, jax.Array]:
    """A grid of K + 1 log-SNRs -> (log_snr_t, log_snr_s) of each evaluation of the denoiser.

    Each of the K steps is taken `repeats` times, and with `corrects` evaluates twice, once at
    either end. The very last evaluation gives the sample, so nothing corrects it. Neither is the
    first step corrected: it sets out from almost pure noise, where sigma / alpha is e^10 and more
    than the mean of two slopes can span, but x_hat hardly changes.
    """
    start = np.arange(len(log_snr) - 1)[:, None, None]
    ends = np.concatenate([start, start + 1], axis=2) if corrects else start
    taken = np.ones((len(start), repeats, ends.shape[2]), bool)
    taken[0, :, 1:] = taken[-1, -1, 1:] = False
    index_t, index_s = (np.broadcast_to(i, taken.shape)[taken] for i in (ends, start + 1))
    return log_snr[index_t], log_snr[index_s]
