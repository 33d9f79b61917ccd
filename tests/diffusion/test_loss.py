"""Weightings and distributions of noise levels against the formulas of their papers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from imagen_jax.common.errors import UserError
from imagen_jax.diffusion.loss import (
    BIASED,
    TIME_SAMPLING,
    TimeSampling,
    diffusion_loss,
    sample_t,
    sqrt_v,
)
from imagen_jax.diffusion.loss import sigmoid as sigmoid_weight
from imagen_jax.diffusion.process import Schedule
from imagen_jax.sections import DiffusionConfig

LOG_SNR = np.linspace(-15, 15, 61)


def affine(z, log_snr_b, cond):
    return 0.3 * z + 0.1


@pytest.mark.parametrize("bias", [-3.0, 0.0, 2.0])
def test_sigmoid_is_the_weight_of_the_papers_on_eps_and_on_x(bias):
    on_eps = np.asarray(sigmoid_weight(jnp.asarray(LOG_SNR, jnp.float32), bias), np.float64)
    on_x = on_eps * np.exp(LOG_SNR)
    np.testing.assert_allclose(on_eps, 1 / (1 + np.exp(LOG_SNR - bias)), rtol=1e-5)
    # arXiv:2410.19324 for a network that predicts x.
    np.testing.assert_allclose(on_x, np.exp(bias) / (1 + np.exp(bias - LOG_SNR)), rtol=1e-5)
    # Soft-min-SNR (arXiv:2401.11605): 1 / (sigma^2 + 1 / gamma) in EDM's sigma.
    np.testing.assert_allclose(on_x, 1 / (np.exp(-LOG_SNR) + np.exp(-bias)), rtol=1e-5)


def test_sqrt_v_weights_the_error_of_x_as_stated():
    weight = np.asarray(sqrt_v(jnp.asarray(LOG_SNR, jnp.float32), -5.0), np.float64)
    expected = np.sqrt(1 + np.exp(np.minimum(LOG_SNR, 2) + 5))
    np.testing.assert_allclose(weight * np.exp(LOG_SNR), expected, rtol=1e-5)


@pytest.mark.parametrize("weighting", BIASED)
def test_the_loss_uses_the_bias(weighting):
    x, key = jnp.zeros((4, 2, 2, 3)), jax.random.key(0)
    losses = [
        diffusion_loss(
            affine, x, {}, key, schedule=Schedule(), weighting=weighting, weighting_bias=bias
        )[0]
        for bias in (0.0, 3.0)
    ]
    assert not np.allclose(*losses)


def test_x_prediction_with_the_flow_weighting_is_the_v_loss_of_jit():
    """JiT (arXiv:2511.13720): z = t x + (1 - t) e, and v = (x_hat - z) / (1 - t) against x - e."""
    x = jnp.tanh(jax.random.normal(jax.random.key(0), (8, 4, 4, 3)))
    seen = {}

    def x_hat(z, log_snr_b, cond):
        seen.update(z=z, log_snr=log_snr_b)
        return affine(z, log_snr_b, cond)

    times = TimeSampling("logit_normal", mean=0.8, std=0.8)
    loss_b, _ = diffusion_loss(
        x_hat, x, {}, jax.random.key(1), schedule=Schedule("flow"),
        prediction="x", weighting="flow", time_sampling=times,
    )  # fmt: skip
    z, log_snr = (np.asarray(seen[k], np.float64) for k in ("z", "log_snr"))
    t = (1 / (1 + np.exp(-log_snr / 2)))[:, None, None, None]
    z_jit = z * np.sqrt(t**2 + (1 - t) ** 2)
    e = (z_jit - t * np.asarray(x)) / (1 - t)
    v_hat = (np.asarray(affine(z, None, None)) - z_jit) / (1 - t)
    expected = np.square(v_hat - (np.asarray(x) - e)).mean((1, 2, 3))
    np.testing.assert_allclose(loss_b, expected, rtol=2e-4)


def draws(times, schedule, low_discrepancy, place=slice(None)):
    """Returns log-SNRs of 1000 batches of 4; `place` chooses examples of the batch."""
    keys = jax.random.split(jax.random.key(0), 1000)
    u = jax.vmap(lambda key: sample_t(key, 4, low_discrepancy))(keys)
    return np.asarray(times.log_snr(u, schedule))[:, place].ravel()


@pytest.mark.parametrize("low_discrepancy", [False, True])
@pytest.mark.parametrize(
    "name, schedule, expected",
    [
        # With the flow schedule log_snr = -2 logit(t), so JiT's times are normal in log-SNR.
        ("logit_normal", "flow", stats.norm(-1.6, 1.6)),
        ("log_snr_normal", "cosine", stats.norm(0.8, 0.8)),
        ("log_snr_uniform", "cosine", stats.uniform(-20, 40)),
        ("uniform", "flow", stats.logistic(0, 2)),
    ],
)
def test_log_snrs_have_their_distribution(name, schedule, expected, low_discrepancy):
    parameters = {"mean": 0.8, "std": 0.8} if name.endswith("_normal") else {}
    times = TimeSampling(name, **parameters)
    for place in (0, 3):  # each example alone has the distribution, also with low_discrepancy
        found = draws(times, Schedule(schedule), low_discrepancy, place)
        assert stats.kstest(found, expected.cdf).pvalue > 1e-3


def test_logit_normal_times_are_those_of_sd3():
    """t = sigmoid(n), n ~ N(m, s), and t = 1 is noise (arXiv:2403.03206, section 3.1)."""
    found = draws(TimeSampling("logit_normal", 0.5, 0.6), Schedule("flow"), False)
    t = 1 / (1 + np.exp(found / 2))
    reference = 1 / (1 + np.exp(-np.random.default_rng(0).normal(0.5, 0.6, 4000)))
    assert stats.ks_2samp(t, reference).pvalue > 1e-3


def test_low_discrepancy_spreads_a_batch_over_the_quantiles():
    u = sample_t(jax.random.key(3), 16, True)
    found = TimeSampling("log_snr_normal", -2.5, 2.5).log_snr(u, Schedule())
    quantiles = np.sort(stats.norm.cdf(found, -2.5, 2.5))
    np.testing.assert_allclose(np.diff(quantiles), 1 / 16, atol=1e-5)


@pytest.mark.parametrize("name", TIME_SAMPLING)
def test_log_snrs_stay_within_the_bounds(name):
    wide = {"mean": 0.0, "std": 50.0} if name.endswith("_normal") else {}
    u = jnp.array([0.0, 1e-7, 0.25, 0.5, 0.75, 1 - 1e-7, 1.0])
    for schedule in ("cosine", "linear", "flow"):
        bounded = Schedule(schedule, log_snr_min=-9.0, log_snr_max=7.0)
        found = np.asarray(TimeSampling(name, **wide).log_snr(u, bounded))
        np.testing.assert_allclose(found[[0, -1]], [7, -9], rtol=1e-5)
        assert np.all(np.diff(found) <= 0) and np.isfinite(found).all()


@pytest.mark.parametrize(
    "values, words",
    [
        ({"time_sampling": "normal"}, "diffusion.time_sampling is 'normal'; allowed: uniform, "),
        ({"time_mean": 0.5}, "diffusion.time_mean is 0.5; allowed: 0 with time_sampling=uniform"),
        ({"time_std": 2.0}, "diffusion.time_std is 2.0; allowed: 1 with time_sampling=uniform"),
        (
            {"time_sampling": "log_snr_normal", "time_std": 0.0},
            "diffusion.time_std is 0.0; allowed: a finite number above 0",
        ),
        (
            {"weighting_bias": 1.0},
            "weighting_bias is 1.0; allowed: 0 unless weighting is sigmoid or",
        ),
        ({"weighting": "snr"}, "diffusion.weighting is 'snr'; allowed: eps, "),
        (
            {"weighting": "sigmoid", "weighting_bias": float("inf")},
            "diffusion.weighting_bias is inf; allowed: a finite number",
        ),
    ],
)
def test_bad_values_are_user_errors(values, words):
    with pytest.raises(UserError) as e:
        DiffusionConfig(**values)
    assert words in str(e.value) and "\n" not in str(e.value)
