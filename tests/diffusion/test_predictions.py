"""Predictions and loss weightings: conversions, consistency, and both ends of the schedule."""

import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import normal

from imagen_jax.diffusion import process
from imagen_jax.diffusion.loss import WEIGHTINGS
from imagen_jax.diffusion.process import PREDICTIONS, SIGMA_DATA

LOG_SNR_B = jnp.array([-12.0, -2.0, 0.0, 3.0, 12.0])


@pytest.mark.parametrize("name", PREDICTIONS)
def test_a_perfect_output_converts_back_to_x_and_eps(name):
    x, eps = normal(0, (5, 4, 4, 3)), normal(1, (5, 4, 4, 3))
    z = process.q_sample(x, eps, LOG_SNR_B)
    output = PREDICTIONS[name].target(x, eps, LOG_SNR_B)
    x_hat, eps_hat = PREDICTIONS[name].to_x_eps(output, z, LOG_SNR_B)
    # 1 / alpha or 1 / sigma is e^6 at the ends, so the float32 error there is about 1e-4.
    np.testing.assert_allclose(x_hat, x, atol=5e-4)
    np.testing.assert_allclose(eps_hat, eps, atol=5e-4)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_any_output_converts_to_a_pair_that_reproduces_z(name):
    z, output = normal(0, (5, 4, 4, 3)), normal(1, (5, 4, 4, 3))
    x_hat, eps_hat = PREDICTIONS[name].to_x_eps(output, z, LOG_SNR_B)
    np.testing.assert_allclose(process.q_sample(x_hat, eps_hat, LOG_SNR_B), z, atol=5e-5)
    np.testing.assert_allclose(
        PREDICTIONS[name].target(x_hat, eps_hat, LOG_SNR_B), output, atol=5e-4
    )


@pytest.mark.parametrize("name", PREDICTIONS)
def test_eps_error_rescales_the_output_error(name):
    x, eps, wrong = (normal(i, (3, 4, 4, 3)) for i in range(3))
    log_snr_b = jnp.array([-2.0, 0.5, 2.0])
    z = process.q_sample(x, eps, log_snr_b)
    target = PREDICTIONS[name].target(x, eps, log_snr_b)
    _, eps_hat = PREDICTIONS[name].to_x_eps(target + wrong, z, log_snr_b)
    expected = jnp.sum((eps_hat - eps) ** 2, axis=(1, 2, 3))
    scale_b = PREDICTIONS[name].eps_error(log_snr_b)
    np.testing.assert_allclose(scale_b * jnp.sum(wrong**2, axis=(1, 2, 3)), expected, rtol=1e-3)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_the_weighting_named_after_a_prediction_gives_the_plain_error_of_its_output(name):
    log_snr = jnp.linspace(-20, 20, 41)
    factor = WEIGHTINGS[name](log_snr) * PREDICTIONS[name].eps_error(log_snr)
    np.testing.assert_allclose(factor, 1, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_everything_is_finite_at_both_ends(prediction):
    x, eps = normal(0, (2, 2, 2, 3)), normal(1, (2, 2, 2, 3))
    log_snr_b = jnp.array([-20.0, 20.0])
    entry = PREDICTIONS[prediction]
    pair = entry.to_x_eps(entry.target(x, eps, log_snr_b), x, log_snr_b)
    scales = [weight(log_snr_b) * entry.eps_error(log_snr_b) for weight in WEIGHTINGS.values()]
    for value in (*pair, *scales, entry.input_scale(log_snr_b)):
        assert value.dtype == jnp.float32 and bool(jnp.isfinite(value).all())
    assert bool((jnp.stack(scales) > 0).all())


def test_the_edm_network_reads_and_predicts_unit_variance():
    """EDM's table 1: at any noise level, for data with standard deviation SIGMA_DATA."""
    x, eps = SIGMA_DATA * normal(0, (5, 64, 64, 3)), normal(1, (5, 64, 64, 3))
    seen = []
    network = process.scaled_input(lambda z, *_: seen.append(z), PREDICTIONS["edm"])
    network(process.q_sample(x, eps, LOG_SNR_B), LOG_SNR_B, {})
    target = PREDICTIONS["edm"].target(x, eps, LOG_SNR_B)
    for value in (seen[0], target):
        np.testing.assert_allclose(value.std(axis=(1, 2, 3)), 1, rtol=0.03)
