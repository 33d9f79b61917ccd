"""Analytic denoisers for the tests of sampling, and helpers that run a sampler on them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion import process, sampler
from imagen_jax.diffusion.process import PREDICTIONS, Schedule, draw_noise, seed_keys

SHAPE = (8, 8, 3)
COSINE = Schedule("cosine")


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def first_noise(seeds, shape):
    """Returns the noise from which the sampler starts for these seeds."""
    return draw_noise(seed_keys(jnp.asarray(seeds, jnp.uint32)), shape, 0)


def null_cond(batch):
    return {"text": jnp.zeros((batch, 2, 3)), "text_mask": jnp.ones((batch, 2), bool)}


def text_cond(batch, seed=5):
    mask = jnp.arange(4)[None, :] < 1 + jnp.arange(batch)[:, None] % 4
    return {"text": normal(seed, (batch, 4, 3)), "text_mask": mask}


def blank(z, log_snr_b, cond):
    return jnp.zeros_like(z)


def text_denoiser(z, log_snr_b, cond):
    """Returns an arbitrary eps that depends on the prompt, its length and the noise level."""
    masked = cond["text"] * cond["text_mask"][:, :, None]
    prompt_b = masked.sum((1, 2)) + 0.1 * cond["text_mask"].sum(1)
    return jnp.tanh(z + 0.3 * prompt_b[:, None, None, None]) + 0.01 * log_snr_b[:, None, None, None]


class Gaussian:
    """Gaussian data with known mean and anisotropic covariance, as images of shape (2, 2, 3).

    The columns of `axes` are the principal axes, `stds` the standard deviations along them. The
    axes are independent, so everything reduces to Gaussians of one dimension.
    """

    shape = (2, 2, 3)

    def __init__(self, stds, seed=0):
        rng = np.random.default_rng(seed)
        self.stds = np.asarray(stds, np.float64)
        self.mean = rng.uniform(-0.2, 0.2, self.stds.size)
        self.axes, _ = np.linalg.qr(rng.normal(size=(self.stds.size,) * 2))
        self.cov = (self.axes * self.stds**2) @ self.axes.T

    def denoiser(self, prediction):
        """Returns the optimal denoiser, with its output in the given prediction."""
        mean, var = jnp.float32(self.mean)[None], jnp.float32(self.stds**2)[None]
        axes = jnp.float32(self.axes)

        def denoise(z, log_snr_b, cond):
            alpha, sigma = (a[:, None] for a in process.alpha_sigma(log_snr_b))
            gain = alpha * var / (alpha**2 * var + sigma**2)
            along = (z.reshape(len(z), -1) - alpha * mean) @ axes
            x_hat = (mean + (gain * along) @ axes.T).reshape(z.shape)
            sigma = sigma[:, :, None, None]
            eps_hat = (z - alpha[:, :, None, None] * x_hat) / sigma
            return PREDICTIONS[prediction].target(x_hat, eps_hat, log_snr_b)

        return denoise

    def x_hat_on_the_flow(self, z, log_snr_0, log_snr_1):
        """Follows the exact probability flow from z at log_snr_0; x_hat at log_snr_1, [B, 12]."""
        alpha, sigma = alpha_sigma_in_numpy([[log_snr_0], [log_snr_1]])
        var_0, var_1 = (alpha * self.stds) ** 2 + sigma**2
        along = (np.asarray(z, np.float64).reshape(len(z), -1) - alpha[0] * self.mean) @ self.axes
        along *= alpha[1] * self.stds**2 / np.sqrt(var_0 * var_1)
        return self.mean + along @ self.axes.T


def alpha_sigma_in_numpy(log_snr):
    log_snr = np.asarray(log_snr, np.float64)
    return np.sqrt(1 / (1 + np.exp(-log_snr))), np.sqrt(1 / (1 + np.exp(log_snr)))


def recording(denoise):
    """Wraps a denoiser; also returns a list that collects (z, log_snr) of each call under jit."""
    seen = []

    def spy(z, log_snr_b, cond):
        jax.debug.callback(lambda *call: seen.append(call), z, log_snr_b[0], ordered=True)
        return denoise(z, log_snr_b, cond)

    return spy, seen


@functools.lru_cache
def jitted(function, static_argnames, *static):
    return jax.jit(functools.partial(function, *static), static_argnames=static_argnames)


def run(denoise, config, seeds, cond, schedule=COSINE, prediction="eps", shape=SHAPE):
    """Runs `sampler.sample`, compiled."""
    sample = jitted(sampler.sample, ("shape",), denoise, schedule, prediction, config)
    x = sample(jnp.asarray(seeds, jnp.uint32), shape=shape, cond=cond)
    jax.effects_barrier()
    return x
