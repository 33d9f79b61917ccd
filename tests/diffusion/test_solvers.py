"""The steps of the solvers, their evaluation times, and their accuracy on Gaussian data."""

import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import (
    COSINE,
    SHAPE,
    Gaussian,
    alpha_sigma_in_numpy,
    blank,
    first_noise,
    normal,
    null_cond,
    recording,
    run,
)

from imagen_jax.diffusion import process, solvers
from imagen_jax.diffusion.process import Schedule
from imagen_jax.diffusion.sampler import SPACINGS, SamplerConfig
from imagen_jax.diffusion.solvers import SOLVERS, VARIANCES

DETERMINISTIC = ["ddim", "dpmpp_2m", "heun"]
ORDERS = {"ddim": 1, "dpmpp_2m": 2, "heun": 2}
GAUSSIAN = Gaussian(np.geomspace(0.1, 0.3, 12))


def test_ddim_with_the_true_x_stays_on_its_trajectory():
    """z_s has the same x and eps as z_t; only the coefficients change."""
    x, eps = normal(0, (2, *SHAPE)), normal(1, (2, *SHAPE))
    z_s = solvers.ddim(process.q_sample(x, eps, -1.0), x, -1.0, 2.0)
    np.testing.assert_allclose(z_s, process.q_sample(x, eps, 2.0), atol=1e-5)


def test_ancestral_with_the_small_variance_is_the_posterior_given_x():
    """With the true x, a step maps samples of q(z_t | x) to samples of q(z_s | x)."""
    x, eps, noise = 0.7, normal(0, (100_000,)), normal(1, (100_000,))
    z_t = process.q_sample(jnp.full_like(eps, x), eps, -1.0)
    times = jnp.float32(-1.0), jnp.float32(2.0)
    _, z_s = solvers.ancestral_step((), z_t, x, *times, lambda small, _: jnp.sqrt(small) * noise)
    alpha_s, sigma_s = process.alpha_sigma(jnp.float32(2.0))
    assert z_s.mean() == pytest.approx(float(alpha_s) * x, abs=0.005)
    assert z_s.std() == pytest.approx(float(sigma_s), rel=0.01)


def test_ancestral_variance_lies_between_the_papers_limits():
    """gamma = 0: sigma~^2_{s|t} = (1 - r) sigma_s^2; 1: sigma^2_{t|s} = (1 - r) sigma_t^2."""
    limits = []
    times = jnp.float32(-1.0), jnp.float32(0.5)
    solvers.ancestral_step((), 0.3, 0.1, *times, lambda *pair: limits.append(pair) or 0.0)
    r = np.exp(-1.5)
    small, large = (1 - r) / (1 + np.exp(0.5)), (1 - r) / (1 + np.exp(-1.0))
    np.testing.assert_allclose(limits, [(small, large)], rtol=1e-5)
    for gamma, between in {0.0: (small, small), 1.0: (large, large)}.items():
        found = [VARIANCES[name](small, large, gamma) for name in ("geometric", "linear")]
        np.testing.assert_allclose(found, between, rtol=1e-6)
    assert VARIANCES["geometric"](small, large, 0.3) == pytest.approx(small**0.7 * large**0.3)
    assert VARIANCES["linear"](small, large, 0.3) == pytest.approx(0.7 * small + 0.3 * large)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_first_step_is_ddim(name):
    z, x_hat = normal(0, (2, *SHAPE)), normal(1, (2, *SHAPE))
    times = jnp.float32(-3.0), jnp.float32(1.0)
    _, z_s = SOLVERS[name].step(SOLVERS[name].init(z, times[0]), z, x_hat, *times, None)
    np.testing.assert_allclose(z_s, solvers.ddim(z, x_hat, *times), atol=1e-5)


def test_dpmpp_2m_does_not_extrapolate_after_resampling():
    z, x_hat, before = (normal(i, (2, *SHAPE)) for i in range(3))
    for log_snr_before in (-1.0, 0.5):
        times = jnp.float32(-1.0), jnp.float32(0.5)
        _, z_s = solvers.dpmpp_2m_step(
            (before, jnp.float32(log_snr_before)), z, x_hat, *times, None
        )
        np.testing.assert_array_equal(z_s, solvers.ddim(z, x_hat, *times))


def test_one_step_of_dpmpp_2m_errs_by_the_third_power_of_its_size():
    """With x_hat = lambda, for which the exact flow is an integral."""
    errors = []
    for h in (0.2, 0.1):
        lam = np.linspace(1.0, 1.0 + h, 4001)
        _, sigma = alpha_sigma_in_numpy(lam)
        integral = np.trapezoid(lam * np.exp(0.5 * lam) * 0.5, lam)
        exact = sigma[-1] / sigma[0] * 0.7 + sigma[-1] * integral
        state = (jnp.float32(1.0 - h), jnp.float32(1.0 - h))
        times = jnp.float32(1.0), jnp.float32(1.0 + h)
        _, z_s = solvers.dpmpp_2m_step(state, jnp.float32(0.7), jnp.float32(1.0), *times, None)
        errors.append(abs(float(z_s) - exact))
    assert errors[0] < 1e-3 and errors[1] < errors[0] / 6


def heun_in_numpy(x_of, y, s, s_next):
    """EDM's algorithm 1 with S_churn = 0; y = z / alpha, s = sigma / alpha."""
    slope = (y - x_of(y, s)) / s
    reached = y + (s_next - s) * slope
    return y + (s_next - s) * 0.5 * (slope + (reached - x_of(reached, s_next)) / s_next)


def test_heun_is_edms_algorithm_for_z_over_alpha():
    def x_of(y, s):
        return np.tanh(y / np.sqrt(1 + s**2))

    times = jnp.float32(-1.0), jnp.float32(0.5)
    z = normal(0, (2, *SHAPE))
    state = solvers.heun_init(z, times[0])
    state, reached = solvers.heun_step(state, z, jnp.tanh(z), *times, None)
    _, z_s = solvers.heun_step(state, reached, jnp.tanh(reached), times[1], times[1], None)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = map(alpha_sigma_in_numpy, (-1.0, 0.5))
    # tanh(z) = x_of(z / alpha, sigma / alpha), because alpha^2 + sigma^2 = 1.
    expected = heun_in_numpy(x_of, np.asarray(z) / alpha_t, sigma_t / alpha_t, sigma_s / alpha_s)
    np.testing.assert_allclose(z_s, alpha_s * expected, atol=1e-5)


def test_each_solver_evaluates_the_grid_in_its_own_order():
    grid = jnp.array([-2.0, -1.0, 1.0, 2.0])
    plain = [(-2, -1), (-1, 1), (1, 2)]
    corrected = [(-2, -1), (-1, 1), (1, 1), (1, 2)]
    twice = [(-2, -1), (-2, -1), (-1, 1), (1, 1), (-1, 1), (1, 1), (1, 2), (2, 2), (1, 2)]
    for arguments, expected in {
        (False, 1): plain,
        (True, 1): corrected,
        (False, 3): np.repeat(plain, 3, axis=0),
        (True, 2): twice,
    }.items():
        pairs = np.stack(solvers.evaluations(grid, *arguments), axis=1)
        np.testing.assert_array_equal(pairs, expected)
    np.testing.assert_array_equal(solvers.evaluations(grid[:2], True), [[-2], [-1]])


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", SOLVERS)
def test_the_denoiser_runs_at_the_log_snrs_of_the_spacing(name, spacing):
    denoise, seen = recording(blank)
    run(denoise, SamplerConfig(name, num_steps=8, spacing=spacing), range(16), null_cond(16))
    grid = {"t": COSINE.log_snr(jnp.linspace(1, 0, 9)), "log_snr": np.linspace(-20, 20, 9)}[spacing]
    expected = np.concatenate([grid[:2], np.repeat(grid[2:-1], 2)]) if name == "heun" else grid[:-1]
    np.testing.assert_allclose([lam for _, lam in seen], expected, atol=1e-4)
    assert seen[0][0].std() == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_the_error_falls_at_the_solvers_order(name, spacing):
    """Against the exact flow, over a range of log-SNR where the steps of both spacings are small.

    The exact result is x_hat at the last evaluation, so only the error of the solver counts.
    """
    schedule, seeds, errors = Schedule("cosine", -3.0, 3.0), range(16), []
    noise = first_noise(seeds, GAUSSIAN.shape)
    denoise = GAUSSIAN.denoiser("x")
    for num_steps in (32, 128):
        config = SamplerConfig(name, num_steps=num_steps, spacing=spacing, threshold="none")
        x = run(denoise, config, seeds, null_cond(16), schedule, "x", GAUSSIAN.shape)
        grid = SPACINGS[spacing](schedule, 1.0, num_steps)
        exact = GAUSSIAN.x_hat_on_the_flow(noise, grid[0], grid[-2])
        errors.append(np.abs(np.asarray(x).reshape(16, -1) - exact).max())
    assert np.log(errors[0] / errors[1]) / np.log(4) == pytest.approx(ORDERS[name], abs=0.2)
    assert errors[-1] < 3e-3 / 64 ** (ORDERS[name] - 1)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_mean_and_covariance_of_gaussian_data(name, spacing):
    """The sample is affine in the noise, A z + b: its covariance is A A', its mean b."""
    seeds = range(64)
    config = SamplerConfig(name, num_steps=128, spacing=spacing, threshold="none")
    denoise = GAUSSIAN.denoiser("v")
    x = run(denoise, config, seeds, null_cond(64), COSINE, "v", GAUSSIAN.shape)
    inside = np.all(np.abs(x) < 1, axis=(1, 2, 3))
    z = np.asarray(first_noise(seeds, GAUSSIAN.shape)).reshape(64, -1)[inside]
    x = np.asarray(x).reshape(64, -1)[inside]
    solution, *_ = np.linalg.lstsq(np.column_stack([z, np.ones(len(z))]), x)
    matrix, mean = solution[:-1], solution[-1]
    np.testing.assert_allclose(np.column_stack([z, np.ones(len(z))]) @ solution, x, atol=1e-4)
    # DDIM is only first order, and 128 steps cover 40 units of log-SNR.
    rtol = {"ddim": 0.12, "dpmpp_2m": 0.01, "heun": 0.015}[name]
    np.testing.assert_allclose(mean, GAUSSIAN.mean, atol=rtol * 0.1)
    np.testing.assert_allclose(matrix.T @ matrix, GAUSSIAN.cov, atol=rtol * GAUSSIAN.cov.max())


@pytest.mark.parametrize("schedule, name", [("linear", "heun"), ("flow", "dpmpp_2m")])
def test_every_schedule_leads_to_the_data(schedule, name):
    config = SamplerConfig(name, num_steps=64, spacing="log_snr", threshold="none")
    denoise = GAUSSIAN.denoiser("flow")
    schedule = Schedule(schedule)
    x = run(denoise, config, range(8), null_cond(8), schedule, "flow", GAUSSIAN.shape)
    start, end = schedule.log_snr(jnp.array([1.0, 0.0]))
    exact = GAUSSIAN.x_hat_on_the_flow(first_noise(range(8), GAUSSIAN.shape), start, end)
    np.testing.assert_allclose(x.reshape(8, -1), np.clip(exact, -1, 1), atol=0.01)


def ancestral_stds_in_numpy(num_steps, gamma):
    """Propagates the stds of z through the ancestral steps of appendix A."""
    lam = np.asarray(COSINE.log_snr(jnp.linspace(1, 0, num_steps + 1)), np.float64)
    alpha, sigma = alpha_sigma_in_numpy(lam)
    variance = np.ones_like(GAUSSIAN.stds)
    for t in range(num_steps):
        data = GAUSSIAN.stds**2
        gain = alpha[t] * data / (alpha[t] ** 2 * data + sigma[t] ** 2)
        x_variance, s = gain**2 * variance, t + 1
        r = np.exp(lam[t] - lam[s])
        noise = (1 - r) * sigma[s] ** (2 * (1 - gamma)) * sigma[t] ** (2 * gamma)
        variance = (r * alpha[s] / alpha[t] + (1 - r) * alpha[s] * gain) ** 2 * variance + noise
    return np.sqrt(x_variance)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_ancestral_reproduces_the_moments_of_gaussian_data(gamma):
    config = SamplerConfig("ancestral", num_steps=256, gamma=gamma, threshold="none")
    seeds, denoise = range(2048), GAUSSIAN.denoiser("eps")
    x = run(denoise, config, seeds, null_cond(2048), COSINE, "eps", GAUSSIAN.shape)
    along = (np.asarray(x, np.float64).reshape(2048, -1) - GAUSSIAN.mean) @ GAUSSIAN.axes
    # Four standard errors of 2048 samples; more for the largest of 66 correlations.
    np.testing.assert_allclose(along.mean(0) / GAUSSIAN.stds, 0, atol=4 / 45)
    np.testing.assert_allclose(along.std(0), ancestral_stds_in_numpy(256, gamma), rtol=4 / 64)
    assert np.abs(np.corrcoef(along.T) - np.eye(12)).max() < 5 / 45
    # With finitely many steps the std is below that of the data for gamma = 0, above for gamma = 1.
    np.testing.assert_allclose(along.std(0), GAUSSIAN.stds, rtol=0.1)


def test_ancestral_stds_bracket_the_data_and_converge():
    few, many = ([ancestral_stds_in_numpy(n, gamma) for gamma in (0.0, 1.0)] for n in (64, 1024))
    order = [few[0], many[0], GAUSSIAN.stds, many[1], few[1]]
    assert np.all(np.diff(order, axis=0) > 0)
