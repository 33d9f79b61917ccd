"""Gaussian diffusion in log-SNR and continuous time (Imagen, arXiv:2205.11487, appendix A).

    z_t = alpha_t x + sigma_t eps,    alpha_t^2 + sigma_t^2 = 1    (variance preserving)
    lambda_t = log(alpha_t^2 / sigma_t^2),    t in [0, 1], lambda_t decreasing in t

`log_snr` is lambda_t and is either a scalar or one value per example, [B]. Images are in [-1, 1].
Schedules, predictions and loss weights are tables from a name to functions: a new one is a line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.common.typed_config import require

# EDM's standard deviation of the data, in [-1, 1] (arXiv:2206.00364, table 1).
SIGMA_DATA = 0.5

Cond = dict[str, jax.Array]
Denoiser = Callable[[jax.Array, jax.Array, Cond], jax.Array]


def lookup(table: Mapping[str, Any], key: str, name: str) -> Any:
    """The entry `name` of a table; a UserError that names the config key if there is none."""
    require(name in table, key, name, ", ".join(table))
    return table[name]


def to_float(image: jax.Array) -> jax.Array:
    """uint8 pixels -> float32 in [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(x: np.ndarray) -> np.ndarray:
    """Values in [-1, 1] -> uint8 pixels."""
    return np.clip(np.round((x + 1.0) * 127.5), 0, 255).astype(np.uint8)


# Schedules: (t, log_snr_min, log_snr_max) -> log_snr.


def cosine_log_snr(t: jax.Array, log_snr_min: float, log_snr_max: float) -> jax.Array:
    """alpha_t = cos(pi t / 2), with the angle's range cut so that log_snr stays in its bounds.

    lambda = -2 log tan(angle). Both the angle and its complement are interpolated, because near
    the far end float32 cannot hold pi/2 minus a small angle.
    """
    first = np.arctan(np.exp(-0.5 * log_snr_max))
    last = np.arctan(np.exp(0.5 * log_snr_min))
    span = np.pi / 2 - first - last
    return 2 * (jnp.log(jnp.sin(last + span * (1 - t))) - jnp.log(jnp.sin(first + span * t)))


def linear_log_snr(t: jax.Array, log_snr_min: float, log_snr_max: float) -> jax.Array:
    """DDPM's 1000 steps with beta from 1e-4 to 0.02, in continuous time; clipped to the bounds.

    With alpha_bar_n = prod_{i<=n} (1 - beta_i), alpha^2(n / 1000) is exactly alpha_bar_n; between
    the grid points log alpha^2 is interpolated, i.e. each step's noise comes at a constant rate.
    """
    log_alpha_bar = np.cumsum(np.log1p(-np.linspace(1e-4, 0.02, 1000)))
    grid = np.linspace(0, 1, 1001)
    log_alpha_sq = jnp.interp(t, grid, np.concatenate([[0.0], log_alpha_bar]))
    # log(a / (1 - a)) for a = exp(log a); at t = 0 it is +inf and the clip makes it finite.
    return jnp.clip(-jnp.log(jnp.expm1(-log_alpha_sq)), log_snr_min, log_snr_max)


def flow_log_snr(t: jax.Array, log_snr_min: float, log_snr_max: float) -> jax.Array:
    """Rectified flow's (1 - t) x + t eps (arXiv:2209.03003), clipped to the bounds.

    Only its log-SNR, 2 log((1 - t) / t), counts: z is that point over sqrt((1 - t)^2 + t^2).
    """
    return jnp.clip(2 * (jnp.log1p(-t) - jnp.log(t)), log_snr_min, log_snr_max)


SCHEDULES: dict[str, Callable[[jax.Array, float, float], jax.Array]] = {
    "cosine": cosine_log_snr,
    "linear": linear_log_snr,
    "flow": flow_log_snr,
}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A named noise schedule and the range its log-SNR is confined to.

    Raises UserError for an unknown name or an empty range.
    """

    name: str = "cosine"
    log_snr_min: float = -20.0
    log_snr_max: float = 20.0

    def __post_init__(self):
        lookup(SCHEDULES, "diffusion.schedule", self.name)
        below = self.log_snr_min < self.log_snr_max
        allowed = f"below log_snr_max, {self.log_snr_max}"
        require(below, "diffusion.log_snr_min", self.log_snr_min, allowed)

    def log_snr(self, t: jax.Array) -> jax.Array:
        """lambda_t for t in [0, 1], any shape; strictly decreasing inside the bounds."""
        return SCHEDULES[self.name](t, self.log_snr_min, self.log_snr_max)


# Forward process.


def alpha_sigma(log_snr: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(alpha, sigma) at a log-SNR, same shape: sqrt(sigmoid(lambda)), sqrt(sigmoid(-lambda)).

    Not sigma = sqrt(1 - alpha^2), which in float32 is 0 beyond lambda = 17.
    """
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))


def _like(value: jax.Array, x: jax.Array) -> jax.Array:
    """A scalar or one value per example with trailing axes added: [B] -> [B, 1, 1, 1]."""
    value = jnp.asarray(value)
    return value.reshape(value.shape + (1,) * (x.ndim - value.ndim))


def _alpha_sigma_like(log_snr: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """alpha_sigma, so that it multiplies x."""
    return alpha_sigma(_like(log_snr, x))


def q_sample(x: jax.Array, eps: jax.Array, log_snr: jax.Array) -> jax.Array:
    """z_t = alpha_t x + sigma_t eps. x, eps: [B, ...]; log_snr: scalar or [B]."""
    alpha, sigma = _alpha_sigma_like(log_snr, x)
    return alpha * x + sigma * eps


# Predictions: what the network's output means.


class Prediction(NamedTuple):
    """One parameterisation of the denoiser.

    target: (x, eps, log_snr) -> what the output should be.
    to_x_eps: (output, z, log_snr) -> (x_hat, eps_hat), with z = alpha x_hat + sigma eps_hat.
    eps_error: log_snr -> the factor from the squared error of the output to that of eps_hat.
    input_scale: log_snr -> the factor on z before the network, see `scaled_input`.
    """

    target: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    to_x_eps: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
    eps_error: Callable[[jax.Array], jax.Array]
    input_scale: Callable[[jax.Array], jax.Array] = jnp.ones_like


def scaled_input(denoise: Denoiser, prediction: Prediction) -> Denoiser:
    """The denoiser as a function of z, for the network as a function of input_scale z."""

    def scaled(z: jax.Array, log_snr_b: jax.Array, cond: Cond) -> jax.Array:
        return denoise(_like(prediction.input_scale(log_snr_b), z) * z, log_snr_b, cond)

    return scaled


def _x_eps_from_eps(eps_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return (z - sigma * eps_hat) / alpha, eps_hat


def _x_eps_from_x(x_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return x_hat, (z - alpha * x_hat) / sigma


def _v_target(x, eps, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, x)
    return alpha * eps - sigma * x


def _x_eps_from_v(v_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return alpha * z - sigma * v_hat, sigma * z + alpha * v_hat


def _x_eps_from_flow(u_hat, z, log_snr):
    alpha, sigma = _alpha_sigma_like(log_snr, z)
    return (z - sigma * u_hat) / (alpha + sigma), (z + alpha * u_hat) / (alpha + sigma)


# EDM's network F in D = c_skip y + c_out F(c_in y), y = z / alpha at noise level sigma / alpha:
# c_in y is z over its standard deviation, and F would be -v were SIGMA_DATA 1.
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


# v: Salimans & Ho, arXiv:2202.00512, section 4. edm: arXiv:2206.00364, table 1. flow: rectified
# flow's velocity, arXiv:2209.03003; its time is t = sigma / (alpha + sigma).
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


# Noise of a sample, from its seed alone.


# i -> the i-th standard normal noise, float32 [B, ...].
NoiseStream = Callable[[jax.Array], jax.Array]


def seed_keys(seeds_b: jax.Array, stream: int = 0) -> jax.Array:
    """uint32 [B] -> a key for each sample, [B]; different streams of a seed share no noise.

    Stream 0 is that of the solvers; what else needs noise of a sample's own takes another.
    """

    def key_of(seed):
        # Named, because under vmap the faster "rbg" generator does not keep each key's stream.
        key = jax.random.key(seed, impl="threefry2x32")
        # Streams count down from the top: the solvers' draws count up from 0.
        return jax.random.fold_in(key, 2**32 - stream) if stream else key

    return jax.vmap(key_of)(jnp.asarray(seeds_b, jnp.uint32))


def draw_noise(keys_b: jax.Array, shape: tuple[int, ...], i: jax.Array) -> jax.Array:
    """The i-th standard normal noise of each key, float32 [B, *shape]."""

    def normal(key):
        # Of its size, too: else a cascade's stages would share the first of their noise.
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, i), shape[0]), shape)

    return jax.vmap(normal)(keys_b)
