"""Schedules, the loss, noise conditioning augmentation and the null prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion import process
from imagen_jax.diffusion.conditioning import augment, drop_text
from imagen_jax.diffusion.loss import WEIGHTINGS, diffusion_loss, sample_t
from imagen_jax.diffusion.process import PREDICTIONS, SCHEDULES, SIGMA_DATA, Schedule
from imagen_jax.sections import DiffusionConfig
from imagen_jax.stage import Stage

LINEAR_BETAS = np.linspace(1e-4, 0.02, 1000)


def normal(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def blank(z, log_snr_b, cond):
    return jnp.zeros_like(z)


def affine(z, log_snr_b, cond):
    return 0.3 * z + 0.1


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_snr_decreases_and_stays_within_its_bounds(name):
    t = jnp.linspace(0, 1, 2001)
    log_snr = np.asarray(Schedule(name).log_snr(t))
    assert np.all(np.diff(log_snr) < 0)
    assert log_snr.max() <= 20.0001 and log_snr.min() >= -20.0001
    clipped = np.asarray(Schedule(name, log_snr_min=-5.0, log_snr_max=6.0).log_snr(t))
    np.testing.assert_allclose(clipped[[0, -1]], [6, -5], rtol=1e-5)
    assert np.all(np.diff(clipped) <= 0)


def test_cosine_is_the_cosine_and_exact_at_its_bounds():
    t = np.linspace(0, 1, 501)
    log_snr = Schedule("cosine").log_snr(jnp.asarray(t, jnp.float32))
    alpha, sigma = process.alpha_sigma(log_snr)
    np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), atol=1e-4)
    np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), atol=1e-4)
    np.testing.assert_allclose(log_snr[jnp.array([0, 250, 500])], [20, 0, -20], atol=1e-5)


def test_linear_is_ddpm_at_every_grid_point():
    alpha_bar = np.cumprod(1 - LINEAR_BETAS)
    log_snr = Schedule("linear").log_snr(jnp.arange(1, 1001) / 1000)
    alpha, sigma = process.alpha_sigma(log_snr)
    np.testing.assert_allclose(np.square(alpha), alpha_bar, rtol=1e-4)
    np.testing.assert_allclose(np.square(sigma), 1 - alpha_bar, rtol=1e-4)


def test_linear_is_the_chain_of_small_discrete_steps():
    """The mean and variance of x_n = sqrt(1 - beta_n) x_{n-1} + sqrt(beta_n) eps, step by step."""
    log_snr = Schedule("linear").log_snr(jnp.arange(1, 1001) / 1000)
    alpha, sigma = map(np.asarray, process.alpha_sigma(log_snr))
    mean, variance = 1.0, 0.0
    for n, beta in enumerate(LINEAR_BETAS):
        mean, variance = np.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        assert alpha[n] == pytest.approx(mean, rel=1e-4)
        assert sigma[n] ** 2 == pytest.approx(variance, rel=1e-4)


def test_the_shift_is_that_of_simple_diffusion():
    """-2 log tan(pi t / 2) + 2 log(64 / d), which is the log-SNR at 64 after average pooling."""
    t = np.linspace(0.05, 0.95, 19)
    schedule = Schedule("cosine", shift=2 * np.log(64 / 256))
    found = np.asarray(schedule.log_snr(jnp.asarray(t, jnp.float32)))
    expected = -2 * np.log(np.tan(np.pi * t / 2)) + 2 * np.log(64 / 256)
    np.testing.assert_allclose(found, expected, atol=1e-2)
    # Pool the noise of a 256-pixel image of constant brightness to 64: its SNR is that of 64.
    alpha, sigma = process.alpha_sigma(jnp.float32(found[9]))
    noise = sigma * normal(0, (1, 256, 256, 1)).reshape(64, 4, 64, 4).mean((1, 3))
    at_64 = Schedule("cosine").log_snr(jnp.float32(t[9]))
    assert 2 * np.log(alpha / noise.std()) == pytest.approx(float(at_64), abs=0.1)


def test_the_noise_scale_of_jit_is_a_shift():
    t = jnp.linspace(0.1, 0.9, 9)  # here t = 1 is noise
    scale = 512 / 256
    shifted = Schedule("flow", shift=-2 * np.log(scale)).log_snr(t)
    np.testing.assert_allclose(shifted, 2 * jnp.log((1 - t) / (t * scale)), atol=1e-5)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_shifted_schedule_keeps_its_bounds(name):
    schedule = Schedule(name, log_snr_min=-12.0, log_snr_max=11.0, shift=-3.0)
    log_snr = np.asarray(schedule.log_snr(jnp.linspace(0, 1, 501)))
    np.testing.assert_allclose(log_snr[[0, -1]], [11, -12], rtol=1e-5)
    assert np.all(np.diff(log_snr) <= 0)


def test_flow_is_the_straight_line_scaled_to_unit_variance():
    t = jnp.linspace(0.01, 0.99, 99)
    alpha, sigma = process.alpha_sigma(Schedule("flow").log_snr(t))
    scale = jnp.sqrt((1 - t) ** 2 + t**2)
    np.testing.assert_allclose(alpha, (1 - t) / scale, rtol=1e-5)
    np.testing.assert_allclose(sigma, t / scale, rtol=1e-5)
    np.testing.assert_array_equal(Schedule("flow").log_snr(jnp.array([0.0, 1.0])), [20, -20])


@pytest.mark.parametrize("name", SCHEDULES)
def test_any_two_times_imply_a_beta_of_ddpm(name):
    """beta = 1 - alpha_t^2 / alpha_s^2 is (1 - e^{lambda_t - lambda_s}) sigma_t^2."""
    log_snr = Schedule(name).log_snr(jnp.linspace(0.01, 1, 100))
    alpha, sigma = (np.asarray(a, np.float64) for a in process.alpha_sigma(log_snr))
    lam = np.asarray(log_snr, np.float64)
    beta = -np.expm1(lam[1:] - lam[:-1]) * sigma[1:] ** 2
    np.testing.assert_allclose(1 - beta, alpha[1:] ** 2 / alpha[:-1] ** 2, atol=2e-6)


def test_cosine_betas_are_ratios_of_squared_cosines():
    """beta_n = 1 - cos^2(theta_n) / cos^2(theta_{n-1}), theta_n = pi n / 2N.

    Without the squares, as some tutorials print it, beta is half of that at mid schedule. Schedule
    shortens the range of theta by 1e-4, so the first and the last 5% of the steps are left out.
    """
    n = np.arange(1001)
    log_snr = Schedule("cosine").log_snr(jnp.asarray(n / 1000, jnp.float32))
    _, sigma = (np.asarray(a, np.float64) for a in process.alpha_sigma(log_snr))
    beta = -np.expm1(np.diff(np.asarray(log_snr, np.float64))) * sigma[1:] ** 2
    cosine = np.cos(np.pi * n / 2000)
    expected = 1 - cosine[1:] ** 2 / cosine[:-1] ** 2
    np.testing.assert_allclose(beta[50:950], expected[50:950], rtol=2e-3)
    without_squares = 1 - cosine[1:] / cosine[:-1]
    assert without_squares[499] / beta[499] == pytest.approx(0.5, rel=2e-3)


def test_alpha_sigma_keep_their_precision_at_both_ends():
    alpha, sigma = process.alpha_sigma(jnp.array([-20.0, 0.0, 20.0]))
    np.testing.assert_allclose(sigma[2], np.exp(-10), rtol=1e-5)
    np.testing.assert_allclose(alpha[0], np.exp(-10), rtol=1e-5)
    np.testing.assert_allclose(np.square(alpha) + np.square(sigma), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "key, value, allowed",
    [
        ("schedule", "cosin", "cosine, linear, flow"),
        ("prediction", "epsilon", "eps, x, v, edm, flow"),
        ("weighting", "snr", "eps, x, v, edm, flow, truncated_snr, min_snr, p2, sigmoid, sqrt_v"),
    ],
)
def test_an_unknown_name_is_a_user_error(key, value, allowed):
    names = {"schedule": "cosine", key: value}
    with pytest.raises(UserError, match=f"diffusion.{key} is '{value}'; allowed: {allowed}"):
        names["schedule"] = Schedule(names["schedule"])
        diffusion_loss(blank, jnp.zeros((1, 2, 2, 3)), {}, jax.random.key(0), **names)


@pytest.mark.parametrize(
    "bounds, words",
    [
        ((3.0, 3.0), r"diffusion.log_snr_min is 3.0; allowed: below log_snr_max, 3.0"),
        ((float("nan"), 3.0), r"diffusion.log_snr_min is nan; allowed: below"),
        ((-float("inf"), 3.0), r"diffusion.log_snr_min is -inf; allowed: below"),
        ((0.0, float("inf")), r"diffusion.log_snr_max is inf; allowed: a finite"),
    ],
)
def test_bad_bounds_are_a_user_error(bounds, words):
    for build in (Schedule, DiffusionConfig):
        with pytest.raises(UserError, match=words):
            build(log_snr_min=bounds[0], log_snr_max=bounds[1])


def test_a_bad_shift_is_a_user_error():
    with pytest.raises(UserError, match=r"diffusion.schedule_shift is inf; allowed: a finite"):
        DiffusionConfig(schedule_shift=float("inf"))


def test_a_stage_uses_the_bounds_and_the_shift_of_its_config(tiny_config):
    tiny_config.diffusion.update(log_snr_min=-10, log_snr_max=15.0)
    assert Stage(parse(tiny_config)).schedule == Schedule("cosine", -10.0, 15.0)
    tiny_config.diffusion.schedule_shift = -1.5
    assert Stage(parse(tiny_config)).schedule == Schedule("cosine", -10.0, 15.0, -1.5)


def test_bounds_and_shift_are_part_of_the_identity_unless_they_are_the_defaults(tiny_config):
    """So checkpoints written before the bounds were config keys still match."""
    tiny_config.diffusion.update(log_snr_min=-20.0, log_snr_max=20.0)
    default = parse(tiny_config).identity
    assert not any("log_snr" in key for key in default)
    tiny_config.diffusion.log_snr_min = -10.0
    assert parse(tiny_config).identity == default | {"diffusion.log_snr_min": -10.0}
    tiny_config.diffusion.log_snr_min, tiny_config.diffusion.schedule_shift = -20.0, -2
    assert parse(tiny_config).identity == default | {"diffusion.schedule_shift": -2.0}


def noise_of(x, key, schedule):
    """Returns (eps, z, log_snr_b) of diffusion_loss for a key, as its denoiser gets them."""
    seen = {}

    def spy(z, log_snr_b, cond):
        seen.update(z=z, log_snr_b=log_snr_b)
        return z

    diffusion_loss(spy, x, {}, key, schedule=schedule)
    alpha, sigma = (a[:, None, None, None] for a in process.alpha_sigma(seen["log_snr_b"]))
    return (seen["z"] - alpha * x) / sigma, seen["z"], seen["log_snr_b"]


def eps_hat_in_numpy(prediction, output, z, alpha, sigma):
    if prediction == "flow":  # eps_hat = z_t + (1 - t) u on rectified flow's straight line
        t = sigma / (alpha + sigma)
        return z / (alpha + sigma) + (1 - t) * output
    if prediction == "edm":  # table 1, at y = z / alpha and noise level s = sigma / alpha
        y, s = z / alpha, sigma / alpha
        x_hat = (SIGMA_DATA**2 * y + s * SIGMA_DATA * np.sqrt(s**2 + SIGMA_DATA**2) * output) / (
            s**2 + SIGMA_DATA**2
        )
        return (z - alpha * x_hat) / sigma
    return {
        "eps": output,
        "x": (z - alpha * output) / sigma,
        "v": sigma * z + alpha * output,
    }[prediction]


def weight_in_numpy(weighting, snr):
    """Each paper's weight on its own error, times the ratio of that error to the error of eps."""
    s2 = 1 / snr
    return {
        "eps": 1.0,
        "x": s2,
        "v": (1 + snr) / snr,
        "edm": (s2 + SIGMA_DATA**2) / (s2 * SIGMA_DATA**2) * s2,
        "flow": (1 + np.sqrt(s2)) ** 2,
        "truncated_snr": np.maximum(snr, 1) * s2,
        "min_snr": np.minimum(snr, 5) * s2,
        "p2": 1 / (1 + snr),
        "sigmoid": 1 / (1 + snr),
        "sqrt_v": np.sqrt(1 + np.minimum(snr, np.exp(2))) * s2,
    }[weighting]


@pytest.mark.parametrize(
    "prediction, weighting",
    [(p, "eps") for p in PREDICTIONS] + [("v", w) for w in WEIGHTINGS],
)
def test_loss_matches_numpy(prediction, weighting):
    """w(lambda) mean((eps_hat - eps)^2) from its definition, in float64."""
    x, key = jnp.tanh(normal(0, (4, 6, 6, 3))), jax.random.key(7)
    schedule = Schedule(log_snr_min=-4.0, log_snr_max=4.0)
    loss_b, log_snr_b = diffusion_loss(
        affine, x, {}, key, schedule=schedule, prediction=prediction, weighting=weighting
    )
    eps, z, log_snr = (np.asarray(a, np.float64) for a in noise_of(x, key, schedule))
    np.testing.assert_array_equal(log_snr_b, log_snr)
    alpha = np.sqrt(1 / (1 + np.exp(-log_snr)))[:, None, None, None]
    sigma = np.sqrt(1 - alpha**2)
    c_in = 1 / np.sqrt(sigma**2 + (SIGMA_DATA * alpha) ** 2) if prediction == "edm" else 1
    eps_hat = eps_hat_in_numpy(prediction, affine(c_in * z, log_snr, {}), z, alpha, sigma)
    w = weight_in_numpy(weighting, np.exp(log_snr))
    np.testing.assert_allclose(loss_b, w * ((eps_hat - eps) ** 2).mean((1, 2, 3)), rtol=2e-3)
    assert loss_b.shape == (4,) and loss_b.dtype == jnp.float32


def test_loss_is_zero_for_the_true_noise_and_one_for_none():
    x, key, schedule = jnp.zeros((64, 8, 8, 3)), jax.random.key(0), Schedule()

    def perfect(z, log_snr_b, cond):
        return z / process.alpha_sigma(log_snr_b)[1][:, None, None, None]

    perfect_b, _ = diffusion_loss(perfect, x, {}, key, schedule=schedule)
    np.testing.assert_allclose(perfect_b, 0, atol=1e-9)
    blank_b, _ = diffusion_loss(blank, x, {}, key, schedule=schedule)
    assert blank_b.mean() == pytest.approx(1, abs=0.05)


def test_loss_accepts_a_bfloat16_output():
    loss_b, _ = diffusion_loss(
        lambda z, *_: z.astype(jnp.bfloat16),
        jnp.zeros((2, 4, 4, 3)),
        {},
        jax.random.key(0),
        schedule=Schedule(),
    )
    assert loss_b.dtype == jnp.float32 and bool(jnp.isfinite(loss_b).all())


def test_every_example_and_key_gets_its_own_noise():
    x = jnp.zeros((8, 4, 4, 3))
    noises = [noise_of(x, jax.random.key(seed), Schedule()) for seed in (0, 1)]
    eps = np.concatenate([np.asarray(d[0]) for d in noises]).reshape(16, -1)
    log_snr = np.concatenate([np.asarray(d[2]) for d in noises])
    assert len(np.unique(eps[:, 0])) == 16 and len(np.unique(log_snr)) == 16
    assert np.abs(np.corrcoef(eps) - np.eye(16)).max() < 0.7


@pytest.mark.parametrize("low_discrepancy", [False, True])
def test_each_time_is_uniform_on_the_unit_interval(low_discrepancy):
    keys = jax.random.split(jax.random.key(0), 2000)
    t = jax.vmap(lambda key: sample_t(key, 4, low_discrepancy))(keys)
    assert float(t.min()) >= 0 and float(t.max()) < 1
    for place in range(4):
        histogram, _ = np.histogram(t[:, place], bins=5, range=(0, 1))
        np.testing.assert_allclose(histogram, 400, atol=90)


def test_low_discrepancy_times_cover_the_interval_evenly():
    t = np.sort(sample_t(jax.random.key(3), 16, True))
    np.testing.assert_allclose(np.diff(t), 1 / 16, atol=1e-6)


def test_augment_spans_from_the_image_itself_to_pure_noise():
    x = jnp.tanh(normal(0, (3, 16, 16, 3)))
    noisy = augment(x, jnp.array([0.0, 0.5, 1.0]), jax.random.key(1))
    np.testing.assert_allclose(noisy[0], x[0], atol=5e-4)
    half, whole = np.asarray(noisy[1] - jnp.sqrt(0.5) * x[1]), np.asarray(noisy[2])
    assert half.std() == pytest.approx(np.sqrt(0.5), rel=0.1)
    assert whole.std() == pytest.approx(1, rel=0.1)
    assert abs(np.corrcoef(whole.ravel(), x[2].ravel())[0, 1]) < 0.1
    assert abs(np.corrcoef(half.ravel(), whole.ravel())[0, 1]) < 0.1


def test_augment_with_one_key_per_example_does_not_depend_on_the_batch():
    x, levels = normal(0, (3, 4, 4, 3)), jnp.array([0.3, 0.6, 0.9])
    keys = jax.vmap(jax.random.key)(jnp.arange(3))
    batch = augment(x, levels, keys)
    for i in range(3):
        alone = augment(x[i : i + 1], levels[i : i + 1], keys[i : i + 1])
        np.testing.assert_allclose(alone[0], batch[i], atol=1e-6)


def test_drop_text_removes_the_prompt_and_its_length():
    text = normal(0, (3, 5, 2)).astype(jnp.bfloat16)
    mask = jnp.arange(5)[None, :] < jnp.array([[2], [5], [1]])
    extra = jnp.ones((3,))
    cond = {"text": text, "text_mask": mask, "aug_level": extra}
    dropped = drop_text(cond, jnp.array([True, False, True]))
    null = [True, False, False, False, False]
    np.testing.assert_array_equal(dropped["text"][0], np.zeros((5, 2)))
    np.testing.assert_array_equal(dropped["text"][2], np.zeros((5, 2)))
    np.testing.assert_array_equal(dropped["text_mask"], [null, [True] * 5, null])
    np.testing.assert_array_equal(dropped["text"][1], text[1])
    assert dropped["text"].dtype == jnp.bfloat16 and dropped["text_mask"].dtype == bool
    assert dropped["aug_level"] is extra and cond["text"] is text


def test_the_loss_needs_no_rank_promotion():
    cond = {"text": jnp.ones((2, 3, 4)), "text_mask": jnp.ones((2, 3), bool)}
    with jax.numpy_rank_promotion("raise"):
        dropped = drop_text(cond, jnp.array([True, False]))
        for prediction in PREDICTIONS:
            diffusion_loss(
                lambda z, *_: z,
                jnp.zeros((2, 4, 4, 3)),
                dropped,
                jax.random.key(0),
                schedule=Schedule("linear"),
                prediction=prediction,
                low_discrepancy=True,
            )
