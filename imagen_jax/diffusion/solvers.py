"""Solvers: the step from z_t and x_hat to z_s, s < t, and the times at which x_hat is evaluated.

A step receives scalar log-SNRs log_snr_t < log_snr_s and one x_hat per evaluation, already guided
and thresholded. Anything else that a solver remembers is in its state. SOLVERS lists the solvers by
name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion.process import alpha_sigma

# (small, large) -> noise whose variance is between the two.
Noise = Callable[[jax.Array, jax.Array], jax.Array]


class Solver(NamedTuple):
    """One way to integrate from noise to data.

    Attributes:
      init: (z, log_snr) at the first time -> state, a pytree of arrays.
      step: (state, z_t, x_hat, log_snr_t, log_snr_s, noise) -> (state, z_s).
      corrects: if True, the denoiser is also evaluated at z_s, and `step` is called again with
        log_snr_t = log_snr_s.
    """

    init: Callable[[jax.Array, jax.Array], Any]
    step: Callable[..., tuple[Any, jax.Array]]
    corrects: bool = False


def ddim(z_t: jax.Array, x_hat: jax.Array, log_snr_t: jax.Array, log_snr_s: jax.Array) -> jax.Array:
    """Returns DDIM's z_s = alpha_s x_hat + (sigma_s / sigma_t) (z_t - alpha_t x_hat).

    Source: appendix A, Eq. 5; arXiv:2010.02502.
    """
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
    """Takes one step of `ddim`: first order, deterministic."""
    return state, ddim(z_t, x_hat, log_snr_t, log_snr_s)


def ancestral_step(
    state: tuple,
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: Noise,
) -> tuple[tuple, jax.Array]:
    """Samples z_s ~ N(mu, variance), DDPM's ancestral sampler. With r = e^{lambda_t - lambda_s}:

        mu = r (alpha_s / alpha_t) z_t + (1 - r) alpha_s x_hat

    The variance is between (1 - r) sigma_s^2, that of q(z_s | z_t, x) (gamma = 0), and
    (1 - r) sigma_t^2, that of q(z_t | z_s) (gamma = 1).
    Source: appendix A, Eq. 6.
    """
    alpha_t, sigma_t = alpha_sigma(log_snr_t)
    alpha_s, sigma_s = alpha_sigma(log_snr_s)
    r = jnp.exp(log_snr_t - log_snr_s)
    one_minus_r = -jnp.expm1(log_snr_t - log_snr_s)
    mean = r * (alpha_s / alpha_t) * z_t + one_minus_r * alpha_s * x_hat
    return state, mean + noise(one_minus_r * sigma_s**2, one_minus_r * sigma_t**2)


# Variance of the ancestral step: (small, large, gamma) -> variance. The paper interpolates
# geometrically (Eq. 6).
VARIANCES: dict[str, Callable[[jax.Array, jax.Array, float], jax.Array]] = {
    "geometric": lambda small, large, gamma: small ** (1 - gamma) * large**gamma,
    "linear": lambda small, large, gamma: small * (1 - gamma) + large * gamma,
}


def dpmpp_2m_init(z: jax.Array, log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the initial state: a log-SNR of infinity means that there is no earlier x_hat."""
    return jnp.zeros_like(z), jnp.float32(jnp.inf)


def dpmpp_2m_step(
    state: tuple[jax.Array, jax.Array],
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: Noise,
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Takes one step of DPM-Solver++(2M): second order, deterministic.

    Source: arXiv:2211.01095, algorithm 2.

    It is a DDIM step whose x_hat is extrapolated linearly in lambda by half a step, from the
    previous x_hat through this one. The state is the previous x_hat and its log-SNR. The first step
    is plain DDIM, and so is a step after a jump back to more noise: neither has an x_hat to
    extrapolate from.
    """
    x_before, log_snr_before = state
    ratio = 0.5 * (log_snr_s - log_snr_t) / (log_snr_t - log_snr_before)
    ahead = x_hat + jnp.where(log_snr_before < log_snr_t, ratio, 0) * (x_hat - x_before)
    return (x_hat, log_snr_t), ddim(z_t, ahead, log_snr_t, log_snr_s)


def heun_init(z: jax.Array, log_snr: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the initial state; its slope is never read."""
    return z, jnp.zeros_like(z), log_snr


def heun_step(
    state: tuple[jax.Array, jax.Array, jax.Array],
    z_t: jax.Array,
    x_hat: jax.Array,
    log_snr_t: jax.Array,
    log_snr_s: jax.Array,
    noise: Noise,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
    """Takes one step of Heun's method: second order, deterministic, no churn.

    Source: EDM, arXiv:2206.00364, algorithm 1.

    In y = z / alpha and s = sigma / alpha the probability flow is dy / ds = eps_hat. If
    log_snr_t < log_snr_s, this is an Euler step, which equals DDIM; the state keeps where the step
    began and its slope. If log_snr_t = log_snr_s, it is the correction: it repeats that step with
    the mean of the slopes at its two ends.
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
    """Turns a grid of K + 1 log-SNRs into (log_snr_t, log_snr_s) of every evaluation.

    Each of the K steps is taken `repeats` times. With `corrects` a step evaluates the denoiser
    twice, at its start and at its end, with two exceptions:
    - The last evaluation returns the sample, so there is nothing to correct.
    - The first step is not corrected. It starts from almost pure noise, where sigma / alpha is
      e^10 by default. That is too large a step in sigma / alpha for the mean of two slopes, while
      x_hat hardly changes.
    """
    start = np.arange(len(log_snr) - 1)[:, None, None]
    ends = np.concatenate([start, start + 1], axis=2) if corrects else start
    taken = np.ones((len(start), repeats, ends.shape[2]), bool)
    taken[0, :, 1:] = taken[-1, -1, 1:] = False
    index_t, index_s = (np.broadcast_to(i, taken.shape)[taken] for i in (ends, start + 1))
    return log_snr[index_t], log_snr[index_s]
