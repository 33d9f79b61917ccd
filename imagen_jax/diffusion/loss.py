"""The training loss, its weightings, and how training draws noise levels.

A weighting is a function of log-SNR that multiplies the squared error of eps_hat. Papers state
their weights for errors of different quantities. Since error(x) = e^-lambda error(eps), a weight w
on the error of x is w e^-lambda here. SNR = e^lambda, so the weight SNR on the error of x is "eps".

Training minimizes the integral of p(lambda) w(lambda) error(eps) over lambda, where p is the
density of the log-SNRs that it draws. Some papers state the product p w as their weight.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri

from imagen_jax.common.typed_config import require
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

# Edges of the log-SNR buckets that losses are reported in; the outer two are open.
LOG_SNR_EDGES = (-6.0, -3.0, -1.0, 1.0, 3.0, 6.0)


def bucket_names() -> list[str]:
    """Returns the metric names of the log-SNR buckets, from noisy (low) to clean (high)."""
    edges = [f"{e:g}" for e in LOG_SNR_EDGES]
    return [f"{low}_to_{high}" for low, high in zip(["-inf", *edges], [*edges, "inf"], strict=True)]


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


def sigmoid(log_snr: jax.Array, bias: float = 0.0) -> jax.Array:
    """Puts the weight sigmoid(bias - lambda) on the error of eps (arXiv:2303.00848).

    On the error of x this is e^bias sigmoid(lambda - bias) = gamma SNR / (gamma + SNR), where
    gamma = e^bias: soft-min-SNR (arXiv:2401.11605, with gamma = 4).

    Simpler diffusion (arXiv:2410.19324) states this weight per unit of log-SNR: it is p w, see
    above. For that, draw log-SNRs with time_sampling="log_snr_uniform", whose p is constant.
    """
    return jax.nn.sigmoid(bias - log_snr)


def sqrt_v(log_snr: jax.Array, bias: float = 0.0, log_snr_cap: float = 2.0) -> jax.Array:
    """Puts the weight sqrt(1 + e^(min(lambda, log_snr_cap) - bias)) on the error of x.

    With bias 0 and no cap, this is the square root of the weight 1 + SNR of "v". Below the bias it
    is constant, like "x"; then it rises with the root of the SNR, up to the cap. A choice of this
    project for short runs: "v" multiplies the error of x by the SNR, so the error that is left at
    low noise dominates the loss.
    """
    return jnp.exp(-log_snr) * jnp.sqrt(1 + jnp.exp(jnp.minimum(log_snr, log_snr_cap) - bias))


# Weightings that turn at a log-SNR, the config key diffusion.weighting_bias.
BIASED = ("sigmoid", "sqrt_v")

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
    "sigmoid": sigmoid,
    "sqrt_v": sqrt_v,
}


def check_weighting(name: str, bias: float) -> None:
    """Raises UserError for an unknown weighting, or a bias that it cannot have."""
    lookup(WEIGHTINGS, "diffusion.weighting", name)
    if name in BIASED:
        require(math.isfinite(bias), "diffusion.weighting_bias", bias, "a finite number")
    else:
        allowed = f"0 unless weighting is {' or '.join(BIASED)}"
        require(bias == 0, "diffusion.weighting_bias", bias, allowed)


# How training draws noise levels: (u, schedule, mean, std) -> log_snr, where u ~ U(0, 1) and
# log_snr decreases in u. Each is an inverse CDF, so evenly spread u give evenly spread quantiles.


def logit_normal(u: jax.Array, schedule: Schedule, mean: float, std: float) -> jax.Array:
    """Draws logit(t) from a normal distribution (SD3, arXiv:2403.03206, section 3.1).

    Our t is noise at 1. JiT (arXiv:2511.13720) counts from noise to data, so its mean of -0.8 is
    0.8 here. With the schedule "flow", log_snr = -2 logit(t) is normal itself.
    """
    return schedule.log_snr(jax.nn.sigmoid(mean + std * ndtri(u)))


def log_snr_uniform(u: jax.Array, schedule: Schedule, mean: float, std: float) -> jax.Array:
    """Draws log-SNRs uniformly between the schedule's bounds."""
    return schedule.log_snr_max + (schedule.log_snr_min - schedule.log_snr_max) * u


def log_snr_normal(u: jax.Array, schedule: Schedule, mean: float, std: float) -> jax.Array:
    """Draws log-SNRs from a normal distribution, clipped to the schedule's bounds.

    EDM (arXiv:2206.00364, table 1) draws ln(sigma / alpha) = -log_snr / 2 with mean -1.2 and
    standard deviation 1.2: here mean 2.4 and std 2.4.
    """
    return jnp.clip(mean - std * ndtri(u), schedule.log_snr_min, schedule.log_snr_max)


TIME_SAMPLING: dict[str, Callable[[jax.Array, Schedule, float, float], jax.Array]] = {
    "uniform": lambda u, schedule, mean, std: schedule.log_snr(u),
    "logit_normal": logit_normal,
    "log_snr_uniform": log_snr_uniform,
    "log_snr_normal": log_snr_normal,
}


@dataclasses.dataclass(frozen=True)
class TimeSampling:
    """A named distribution of noise levels; raises UserError if a value is out of range.

    Attributes:
      name: a key of TIME_SAMPLING.
      mean, std: parameters of the normal distributions; the others allow only the defaults.
    """

    name: str = "uniform"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self):
        lookup(TIME_SAMPLING, "diffusion.time_sampling", self.name)
        normal = self.name.endswith("_normal")
        allowed = "a finite number" if normal else f"0 with time_sampling={self.name}"
        ok = math.isfinite(self.mean) if normal else self.mean == 0
        require(ok, "diffusion.time_mean", self.mean, allowed)
        allowed = "a finite number above 0" if normal else f"1 with time_sampling={self.name}"
        ok = 0 < self.std < math.inf if normal else self.std == 1
        require(ok, "diffusion.time_std", self.std, allowed)

    def log_snr(self, u: jax.Array, schedule: Schedule) -> jax.Array:
        """Returns log-SNRs for u ~ U(0, 1), shaped as u and within the schedule's bounds."""
        return TIME_SAMPLING[self.name](u, schedule, self.mean, self.std)


UNIFORM = TimeSampling()


class Between(NamedTuple):
    """Log-SNRs uniform between two values, which may be traced; used like TimeSampling."""

    low: Any
    high: Any

    def log_snr(self, u: jax.Array, schedule: Schedule) -> jax.Array:
        """Returns log-SNRs for u ~ U(0, 1), shaped as u."""
        del schedule
        return self.high + (self.low - self.high) * u


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
    weighting_bias: float = 0.0,
    time_sampling: TimeSampling | Between = UNIFORM,
    low_discrepancy: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Computes w(lambda_t) mean((eps_hat - eps)^2) per example, each at a random noise level.

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
    if weighting in BIASED:
        weight = functools.partial(weight, bias=weighting_bias)
    t_key, eps_key = jax.random.split(key)
    t_b = sample_t(t_key, x_bhwc.shape[0], low_discrepancy)
    log_snr_b = time_sampling.log_snr(t_b, schedule)
    eps_bhwc = jax.random.normal(eps_key, x_bhwc.shape)
    z_bhwc = q_sample(x_bhwc, eps_bhwc, log_snr_b)
    network = scaled_input(denoise, parameterization)
    output_bhwc = network(z_bhwc, log_snr_b, cond).astype(jnp.float32)
    # Take the error in the output's own space and rescale it: converting the output to eps_hat
    # first would subtract nearly equal numbers at the ends of the schedule.
    error_bhwc = output_bhwc - parameterization.target(x_bhwc, eps_bhwc, log_snr_b)
    scale_b = weight(log_snr_b) * parameterization.eps_error(log_snr_b)
    return scale_b * jnp.mean(jnp.square(error_bhwc), axis=(1, 2, 3)), log_snr_b
