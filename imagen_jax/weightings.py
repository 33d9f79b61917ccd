"""Weights of the loss as functions of log-SNR, all of them of the squared error of eps_hat.

The papers state theirs for errors of different things. As error(x) = e^-lambda error(eps), a weight
w of the error of x is w e^-lambda here; SNR is e^lambda, so the "SNR weighting" of x is "eps".
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# EDM's standard deviation of the data, in [-1, 1] (arXiv:2206.00364, table 1).
SIGMA_DATA = 0.5


def min_snr(log_snr: jax.Array, gamma: float = 5.0) -> jax.Array:
    """min(SNR, gamma) of the error of x (min-SNR-gamma, arXiv:2303.09556)."""
    return jnp.minimum(1, gamma * jnp.exp(-log_snr))


def truncated_snr(log_snr: jax.Array) -> jax.Array:
    """max(SNR, 1) of the error of x (Salimans & Ho, arXiv:2202.00512, section 4)."""
    return jnp.maximum(1, jnp.exp(-log_snr))


def p2(log_snr: jax.Array, k: float = 1.0, gamma: float = 1.0) -> jax.Array:
    """1 / (k + SNR)^gamma of the error of eps (P2, arXiv:2204.00227)."""
    return (k + jnp.exp(log_snr)) ** -gamma


def edm(log_snr: jax.Array) -> jax.Array:
    """(s^2 + s_data^2) / (s s_data)^2 of the error of x, s = sigma / alpha = e^{-lambda / 2}.

    The log-normal distribution of s in training is not part of it: the schedule draws log-SNR.
    Source: EDM, arXiv:2206.00364, table 1.
    """
    return 1 + jnp.exp(-log_snr) / SIGMA_DATA**2


def flow(log_snr: jax.Array) -> jax.Array:
    """(1 / (1 - t))^2: the error of u = eps - x at z = (1 - t) x + t eps (arXiv:2209.03003)."""
    return jnp.square(1 + jnp.exp(-0.5 * log_snr))


# "eps", "x", "v", "edm" and "flow" make the loss the squared error in the space of that prediction.
WEIGHTINGS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "eps": jnp.ones_like,
    "x": lambda log_snr: jnp.exp(-log_snr),
    "v": lambda log_snr: 1 + jnp.exp(-log_snr),
    "edm": edm,
    "flow": flow,
    "truncated_snr": truncated_snr,
    "min_snr": min_snr,
    "p2": p2,
}
