"""Gaussian diffusion in log-SNR and continuous time (Imagen, arXiv:2205.11487, appendix A).

    z_t = alpha_t x + sigma_t eps,    alpha_t^2 + sigma_t^2 = 1    (variance preserving)
    lambda_t = log(alpha_t^2 / sigma_t^2),    t in [0, 1],    lambda_t decreases in t

The code calls lambda_t `log_snr`; it is a scalar or one value per example, [B]. Images are in
[-1, 1]. Schedules and predictions are tables from name to functions: adding one takes one entry.

DDPM's discrete view with N steps is t = n / N and x_n = sqrt(1 - beta_n) x_{n-1} +
sqrt(beta_n) eps, with alpha_bar_n = alpha_t^2 = prod_{i<=n} (1 - beta_i). So any two noise levels
imply the beta of a step between them:

    beta_n = 1 - alpha_bar_n / alpha_bar_{n-1} = (1 - e^{lambda_n - lambda_{n-1}}) sigma_n^2
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.common.typed_config import require

# EDM's standard deviation of the data, in [-1, 1] (arXiv:2206.00364, table 1).
SIGMA_DATA = 0.5
# Default bounds of a schedule's log-SNR.
LOG_SNR_MIN, LOG_SNR_MAX = -20.0, 20.0

Cond = dict[str, jax.Array]
# (z, log_snr_b, cond) -> output.
Denoiser = Callable[[jax.Array, jax.Array, Cond], jax.Array]


def lookup(table: Mapping[str, Any], key: str, name: str) -> Any:
    """Returns table[name]; raises UserError, naming the config key, if there is no such entry."""
    require(name in table, key, name, ", ".join(table))
    return table[name]


def to_float(image: jax.Array) -> jax.Array:
    """Converts uint8 pixels to float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Converts values in [-1, 1] to uint8 pixels."""
    return np.clip(np.round((x + 1.0) * 127.5), 0, 255).astype(np.uint8)


# Schedules: (t, log_snr_min, log_snr_max) -> log_snr.


def cosine_log_snr(t: jax.Array, log_snr_min: float, log_snr_max: float) -> jax.Array:
    """Returns the cosine schedule's lambda = -2 log tan(theta).

    alpha_t = cos(theta) and sigma_t = sin(theta), where theta = pi t / 2, except that its range is
    shortened at both ends so that log_snr stays within its bounds. Both theta and pi/2 - theta are
    interpolated, because float32 cannot represent pi/2 minus a small angle.

    The discrete betas are beta_n = 1 - cos^2(theta_n) / cos^2(theta_{n-1}). Some tutorials print
    1 - cos(theta_n) / cos(theta_{n-1}), without the squares: half the right value over most of the
    schedule.
    """
    first = np.arctan(np.exp(-0.5 * log_snr_max))
    last = np.arctan(np.exp(0.5 * log_snr_min))
    span = np.pi / 2 - first - last
    return 2 * (jnp.log(jnp.sin(last + span * (1 - t))) - jnp.log(jnp.sin(first + span * t)))


def linear_log_snr(t: jax.Array, log_snr_min: float, log_snr_max: float) -> jax.Array:
    """Returns the lambda of DDPM's 1000 steps, beta linear from 1e-4 to 0.02, in continuous time.

    alpha^2(n / 1000) is exactly alpha_bar_n = prod_{i<=n} (1 - beta_i). Between these points
    log alpha^2 is interpolated, so each step adds its noise at a constant rate. The result is
    clipped to the bounds.
    """
    log_alpha_bar = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))
    grid = np.linspace(0, 1, 1001)
    log_alpha_sq = jnp.interp(t, grid, np.concatenate([[0.0], log_alpha_bar]))
    # log(a / (1 - a)) for a = exp(log a); at t = 0 it is +inf and the clip makes it finite.
    return jnp.clip(-jnp.log(jnp.expm1(-log_alpha_sq)), log_snr_min, log_snr_max)


def flow_log_snr(t: jax.Array, log_snr_min: float, log_snr_max: float) -> jax.Array:
    """Returns rectified flow's lambda = 2 log((1 - t) / t), clipped to the bounds.

    Rectified flow's point is (1 - t) x + t eps (arXiv:2209.03003). Only its log-SNR matters here:
    z_t is that point divided by sqrt((1 - t)^2 + t^2).
    """
    return jnp.clip(2 * (jnp.log1p(-t) - jnp.log(t)), log_snr_min, log_snr_max)


SCHEDULES: dict[str, Callable[[jax.Array, float, float], jax.Array]] = {
    "cosine": cosine_log_snr,
    "linear": linear_log_snr,
    "flow": flow_log_snr,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A named noise schedule with bounds on its log-SNR.

    Averaging k^2 pixels into one multiplies the SNR by k^2. The shift 2 log(64 / d) makes an image
    of side d, reduced to 64, as noisy as an unshifted image of side 64 (simple diffusion,
    arXiv:2301.11093, section 3.1). JiT's noise scale s (arXiv:2511.13720) is the shift -2 log(s),
    except that its network sees z undivided by its standard deviation and its loss weights do not
    shift.

    Attributes:
      name: a key of SCHEDULES.
      log_snr_min, log_snr_max: log-SNR at t = 1 and t = 0, after the shift.
      shift: added to the log-SNR at every t, within the bounds.

    Raises UserError if the name is unknown, the bounds are not finite or not in order, or the shift
    is not finite.
    """

    name: str = "cosine"
    log_snr_min: float = LOG_SNR_MIN
    log_snr_max: float = LOG_SNR_MAX
    shift: float = 0.0

    def __post_init__(self):
        lookup(SCHEDULES, "diffusion.schedule", self.name)
        finite = math.isfinite(self.log_snr_max)
        require(finite, "diffusion.log_snr_max", self.log_snr_max, "a finite number")
        below = -math.inf < self.log_snr_min < self.log_snr_max
        allowed = f"below log_snr_max, {self.log_snr_max}, and finite"
        require(below, "diffusion.log_snr_min", self.log_snr_min, allowed)
        finite = math.isfinite(self.shift)
        require(finite, "diffusion.schedule_shift", self.shift, "a finite number")

    def log_snr(self, t: jax.Array) -> jax.Array:
        """Returns lambda_t for t in [0, 1], any shape; strictly decreasing within the bounds."""
        schedule = SCHEDULES[self.name]
        if not self.shift:
            return schedule(t, self.log_snr_min, self.log_snr_max)
        return self.shift + schedule(
            t, self.log_snr_min - self.shift, self.log_snr_max - self.shift
        )


# Forward process.


def alpha_sigma(log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (alpha, sigma) = (sqrt(sigmoid(lambda)), sqrt(sigmoid(-lambda))), shaped as log_snr.

    Not sigma = sqrt(1 - alpha^2), which in float32 is 0 beyond lambda = 17.
    """
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def _like(value: jax.Array, x: jax.Array) -> jax.Array:
    """Adds trailing axes until `value`, a scalar or [B], broadcasts against x: [B, 1, 1, 1]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def _alpha_sigma_like(log_snr: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns alpha_sigma with trailing axes added, to multiply x."""
    return alpha_sigma(_like(log_snr, x))


def q_sample(x: jax.Array, eps: jax.Array, log_snr: jax.Array) -> jax.Array:
    """Samples q(z_t | x): z_t = alpha_t x + sigma_t eps. x, eps: [B, ...]; log_snr: scalar or [B].

    Source: appendix A, Eq. 3.
    """
    alpha, sigma = _alpha_sigma_like(log_snr, x)
    return alpha * x + sigma * eps


# Predictions: what the network's output means.


class Prediction(NamedTuple):
    """One parameterization of the denoiser.

    Attributes:
      target: (x, eps, log_snr) -> the output of a perfect network.
      to_x_eps: (output, z, log_snr) -> (x_hat, eps_hat), where z = alpha x_hat + sigma eps_hat.
      eps_error: log_snr -> factor that converts a squared error of the output to one of eps_hat.
      input_scale: log_snr -> factor on z before the network, see `scaled_input`.
    """

    target: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    to_x_eps: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    eps_error: Callable[[jax.Array], jax.Array]
    input_scale: Callable[[jax.Array], jax.Array] = jnp.ones_like


def scaled_input(denoise: Denoiser, prediction: Prediction) -> Denoiser:
    """Wraps `denoise` so that it multiplies z by the prediction's input_scale first."""

    def scaled(z: jax.Array, log_snr_b: jax.Array, cond: Cond) -> jax.Array:
        return denoise(_like(prediction.input_scale(log_snr_b), z) * z, log_snr_b, cond)

    return scaled


# eps: x_hat = (z - sigma eps_hat) / alpha (Imagen, appendix A).
def _x_eps_from_eps(eps_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return (z - sigma * eps_hat) / alpha, eps_hat


# x: eps_hat = (z - alpha x_hat) / sigma.
def _x_eps_from_x(x_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return x_hat, (z - alpha * x_hat) / sigma


# v = alpha eps - sigma x (Salimans & Ho, arXiv:2202.00512, section 4).
def _v_target(x, eps, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, x)
    return alpha * eps - sigma * x


def _x_eps_from_v(v_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return alpha * z - sigma * v_hat, sigma * z + alpha * v_hat


# flow: rectified flow's velocity u = eps - x (arXiv:2209.03003), at t = sigma / (alpha + sigma).
def _x_eps_from_flow(u_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return (z - sigma * u_hat) / (alpha + sigma), (z + alpha * u_hat) / (alpha + sigma)


# edm: the network F in D = c_skip y + c_out F(c_in y), where y = z / alpha has the noise level
# sigma / alpha (arXiv:2206.00364, table 1). c_in y is z divided by its standard deviation.
# If SIGMA_DATA were 1, F would be -v.
def _edm_input_scale(log_snr):
    alpha, sigma = alpha_sigma(log_snr)
    return jax.lax.rsqrt(sigma**2 + (SIGMA_DATA * alpha) ** 2)


def _edm_target(x, eps, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, x)
    c_in = _like(_edm_input_scale(log_snr), x)
    return c_in * (sigma / SIGMA_DATA * x - SIGMA_DATA * alpha * eps)


def _x_eps_from_edm(output, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    c_in = _like(_edm_input_scale(log_snr), z)
    x_hat = c_in * SIGMA_DATA * (c_in * SIGMA_DATA * alpha * z + sigma * output)
    eps_hat = c_in * (c_in * sigma * z - SIGMA_DATA * alpha * output)
    return x_hat, eps_hat


PREDICTIONS: dict[str, Prediction] = {
    "eps": Prediction(lambda x, eps, log_snr: eps, _x_eps_from_eps, jnp.ones_like),
    "x": Prediction(lambda x, eps, log_snr: x, _x_eps_from_x, jnp.exp),
    "v": Prediction(_v_target, _x_eps_from_v, jax.nn.sigmoid),
    "edm": Prediction(
        _edm_target,
        _x_eps_from_edm,
        lambda log_snr: jax.nn.sigmoid(log_snr + 2 * np.log(SIGMA_DATA)),
        _edm_input_scale,
    ),
    "flow": Prediction(
        lambda x, eps, log_snr: eps - x,
        _x_eps_from_flow,
        lambda log_snr: jnp.square(jax.nn.sigmoid(0.5 * log_snr)),
    ),
}


# Per-sample noise: every sample draws its noise from its own seed.


# i -> standard normal noise number i, float32 [B, ...].
NoiseStream = Callable[[jax.Array], jax.Array]


def seed_keys(seeds_b: jax.Array, stream: int = 0) -> jax.Array:
    """Turns seeds, uint32 [B], into one key per sample, [B].

    Different streams of the same seed are independent. The solvers use stream 0; every other
    consumer of a sample's noise takes a stream of its own.
    """

    def key_of(seed):
        # Fixed: under vmap, the numbers of the faster "rbg" generator depend on the other keys too.
        key = jax.random.key(seed, impl="threefry2x32")
        # Streams count down from 2^32, so they never meet the solvers' step numbers, which count
        # up from 0.
        return jax.random.fold_in(key, 2**32 - stream) if stream else key

    return jax.vmap(key_of)(jnp.asarray(seeds_b, jnp.uint32))


def draw_noise(keys_b: jax.Array, shape: tuple[int, ...], i: jax.Array) -> jax.Array:
    """Draws standard normal noise number i from each key, float32 [B, *shape]."""

    def normal(key):
        # The size is folded in too; otherwise the stages of a cascade would share noise.
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), shape[0]), shape)

    return jax.vmap(normal)(keys_b)
