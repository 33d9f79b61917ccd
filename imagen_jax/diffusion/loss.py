"""The training loss and its weightings.

A weighting is a function of log-SNR that multiplies the squared error of eps_hat. Papers state
their weights for errors of different quantities. Since error(x) = e^-lambda error(eps), a weight w
on the error of x is w e^-lambda here. SNR = e^lambda, so the weight SNR on the error of x is "eps".
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from imagen_jax.diffusion.process import (
    PREDICTIONS,
    SIGMA_DATA,
    Cond,
    Denoiser,
    Schedule,
    lookup,
    q_sample,
    scaled_input,
)


def min_snr(log_snr: jax.Array, gamma: float = 5.0) -> jax.Array:
    """Puts the weight min(SNR, gamma) on the error of x (min-SNR-gamma, arXiv:2303.09556)."""
    return jnp.minimum(1, gamma * jnp.exp(-log_snr))


def truncated_snr(log_snr: jax.Array) -> jax.Array:
    """Puts the weight max(SNR, 1) on the error of x (arXiv:2202.00512, section 4)."""
    return jnp.maximum(1, jnp.exp(-log_snr))


def p2(log_snr: jax.Array, k: float = 1.0, gamma: float = 1.0) -> jax.Array:
    """Puts the weight 1 / (k + SNR)^gamma on the error of eps (P2, arXiv:2204.00227)."""
    return (k + jnp.exp(log_snr)) ** -gamma


def edm(log_snr: jax.Array) -> jax.Array:
    """Puts the weight (s^2 + s_data^2) / (s s_data)^2 on the error of x.

    Here s = sigma / alpha = e^{-lambda / 2}. Source: EDM, arXiv:2206.00364, table 1. EDM also draws
    s from a log-normal distribution; here the schedule determines how log-SNR is distributed.
    """
    return 1 + jnp.exp(-log_snr) / SIGMA_DATA**2


def flow(log_snr: jax.Array) -> jax.Array:
    """Puts the weight (1 / (1 - t))^2 on the error of eps, where z = (1 - t) x + t eps.

    This is the plain squared error of the velocity u = eps - x (arXiv:2209.03003).
    """
    return jnp.square(1 + jnp.exp(-0.5 * log_snr))


# A weighting named after a prediction makes the loss the plain squared error of that prediction.
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


def sample_t(key: jax.Array, batch: int, low_discrepancy: bool) -> jax.Array:
    """Samples times t ~ U(0, 1), float32 [batch].

    With low_discrepancy the batch shares one offset u: t_i = (u + i / batch) mod 1. Each t_i is
    still uniform, but every batch covers [0, 1] evenly, so its loss varies less (VDM,
    arXiv:2107.00630, appendix I.1).
    """
    if low_discrepancy:
        return (jax.random.uniform(key) + jnp.arange(batch) / batch) % 1.0
    return jax.random.uniform(key, (batch,))


def diffusion_loss(
    denoise: Denoiser,
    x_bhwc: jax.Array,
    cond: Cond,
    key: jax.Array,
    *,
    schedule: Schedule,
    prediction: str = "eps",
    weighting: str = "eps",
    low_discrepancy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes w(lambda_t) mean((eps_hat - eps)^2) per example, each at a random t.

    Source: Eq. 1; appendix A has the form in eps space.

    Args:
      x_bhwc: the whole batch, in [-1, 1]. The noise of an example depends on the key and on its
        index in the batch, never on how the batch is sharded.

    Returns:
      (loss_b, log_snr_b), float32 [B] each.

    Raises:
      UserError: the prediction or weighting is unknown.
    """
    parameterization = lookup(PREDICTIONS, "diffusion.prediction", prediction)
    weight = lookup(WEIGHTINGS, "diffusion.weighting", weighting)
    t_key, eps_key = jax.random.split(key)
    log_snr_b = schedule.log_snr(sample_t(t_key, x_bhwc.shape[0], low_discrepancy))
    eps_bhwc = jax.random.normal(eps_key, x_bhwc.shape)
    z_bhwc = q_sample(x_bhwc, eps_bhwc, log_snr_b)
    network = scaled_input(denoise, parameterization)
    output_bhwc = network(z_bhwc, log_snr_b, cond).astype(jnp.float32)
    # Take the error in the output's own space and rescale it: converting the output to eps_hat
    # first would subtract nearly equal numbers at the ends of the schedule.
    error_bhwc = output_bhwc - parameterization.target(x_bhwc, eps_bhwc, log_snr_b)
    scale_b = weight(log_snr_b) * parameterization.eps_error(log_snr_b)
    return scale_b * jnp.mean(jnp.square(error_bhwc), axis=(1, 2, 3)), log_snr_b
