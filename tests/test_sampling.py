"""Steps, guidance, thresholding, per-sample seeds, and exactness on Gaussian data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import diffusion, sampling
from imagen_jax.diffusion import PREDICTIONS, Schedule
from imagen_jax.errors import UserError
from imagen_jax.sampling import SamplerConfig

SHAPE = (8, 8, 3)
MEAN, STD = 0.1, 0.2
COSINE = Schedule("cosine")


def draw(seed, shape):
    return jax.random.normal(jax.random.key(seed), shape)


def null_cond(batch):
    return {"text": jnp.zeros((batch, 2, 3)), "text_mask": jnp.ones((batch, 2), bool)}


def blank(z, log_snr_b, cond):
    return jnp.zeros_like(z)


def gaussian_denoiser(prediction):
    """The optimal denoiser of pixels that are independent N(MEAN, STD^2)."""

    def denoise(z, log_snr_b, cond):
        alpha, sigma = (a[:, None, None, None] for a in diffusion.alpha_sigma(log_snr_b))
        gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        x_hat = MEAN + gain * (z - alpha * MEAN)
        eps_hat = (z - alpha * x_hat) / sigma
        return PREDICTIONS[prediction].target(x_hat, eps_hat, log_snr_b)

    return denoise


def text_denoiser(z, log_snr_b, cond):
    """A made-up eps that depends on the prompt, its length and the noise level."""
    masked = cond["text"] * cond["text_mask"][:, :, None]
    prompt_b = masked.sum((1, 2)) + 0.1 * cond["text_mask"].sum(1)
    return jnp.tanh(z + 0.3 * prompt_b[:, None, None, None]) + 0.01 * log_snr_b[:, None, None, None]


def text_cond(batch):
    mask = jnp.arange(4)[None, :] < 1 + jnp.arange(batch)[:, None] % 4
    return {"text": draw(5, (batch, 4, 3)), "text_mask": mask}


def recording(denoise):
    """The denoiser, and a list that gets (z, log_snr) at each of its calls under jit."""
    seen = []

    def spy(z, log_snr_b, cond):
        jax.debug.callback(lambda *call: seen.append(call), z, log_snr_b[0], ordered=True)
        return denoise(z, log_snr_b, cond)

    return spy, seen


@functools.lru_cache
def jitted(*static):
    return jax.jit(functools.partial(sampling.sample, *static), static_argnames="shape")


def run(denoise, config, seeds, cond, schedule=COSINE, prediction="eps", shape=SHAPE):
    seeds_b = jnp.asarray(seeds, jnp.uint32)
    x = jitted(denoise, schedule, prediction, config)(seeds_b, shape=shape, cond=cond)
    jax.effects_barrier()
    return x


# Steps.


def test_ddim_step_with_the_true_x_stays_on_its_trajectory():
    """It only swaps the coefficients: z_s has the same x and the same eps as z_t."""
    x, eps = draw(0, (2, *SHAPE)), draw(1, (2, *SHAPE))
    z_s = sampling.ddim_step(diffusion.q_sample(x, eps, -1.0), x, -1.0, 2.0, None, None)
    np.testing.assert_allclose(z_s, diffusion.q_sample(x, eps, 2.0), atol=1e-5)


def test_ancestral_gamma_0_is_the_posterior_given_x():
    """With the true x the step turns samples of q(z_t | x) into samples of q(z_s | x)."""
    x, eps, noise = 0.7, draw(0, (100_000,)), draw(1, (100_000,))
    config = SamplerConfig("ancestral", gamma=0.0)
    z_t = diffusion.q_sample(jnp.full_like(eps, x), eps, -1.0)
    z_s = sampling.ancestral_step(z_t, x, jnp.float32(-1.0), jnp.float32(2.0), noise, config)
    alpha_s, sigma_s = diffusion.alpha_sigma(jnp.float32(2.0))
    assert z_s.mean() == pytest.approx(float(alpha_s) * x, abs=0.005)
    assert z_s.std() == pytest.approx(float(sigma_s), rel=0.01)


@pytest.mark.parametrize("variance", sampling.VARIANCES)
def test_ancestral_variance_has_the_papers_limits(variance):
    """gamma = 0: sigma~^2_{s|t} = (1 - r) sigma_s^2; 1: sigma^2_{t|s} = (1 - r) sigma_t^2."""
    log_snr_t, log_snr_s = jnp.float32(-1.0), jnp.float32(0.5)

    def spread(gamma):
        config = SamplerConfig("ancestral", gamma=gamma, variance=variance)
        step = functools.partial(sampling.ancestral_step, 0.3, 0.1, log_snr_t, log_snr_s)
        return float(step(1.0, config) - step(0.0, config)) ** 2

    r = np.exp(-1.5)
    small, large = (1 - r) / (1 + np.exp(0.5)), (1 - r) / (1 + np.exp(-1.0))
    assert spread(0.0) == pytest.approx(small, rel=1e-4)
    assert spread(1.0) == pytest.approx(large, rel=1e-4)
    between = {
        "geometric": small**0.7 * large**0.3,
        "linear": 0.7 * small + 0.3 * large,
    }
    assert spread(0.3) == pytest.approx(between[variance], rel=1e-4)


# Whole samples from a distribution whose optimal denoiser is known.


@pytest.mark.parametrize(
    "schedule, prediction", [("cosine", "eps"), ("cosine", "x"), ("cosine", "v"), ("linear", "eps")]
)
def test_ddim_maps_noise_to_gaussian_data_exactly(schedule, prediction):
    """The exact flow of N(MEAN, STD^2) is x = MEAN + STD z_1: each pixel, not only the moments."""
    denoise, seen = recording(gaussian_denoiser(prediction))
    config = SamplerConfig("ddim", num_steps=256, threshold="none")
    x = run(denoise, config, range(4), null_cond(4), Schedule(schedule), prediction)
    exact = MEAN + STD * seen[0][0]
    np.testing.assert_allclose(x, np.clip(exact, -1, 1), atol=0.02)


def ancestral_std_in_numpy(num_steps, gamma):
    """The std of the ancestral sample, by propagating the variance of z through appendix A."""
    lam = np.asarray(COSINE.log_snr(jnp.linspace(1, 0, num_steps + 1)), np.float64)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-lam))), np.sqrt(1 / (1 + np.exp(lam)))
    variance = 1.0
    for t in range(num_steps):
        gain = alpha[t] * STD**2 / ((alpha[t] * STD) ** 2 + sigma[t] ** 2)
        x_variance, s = gain**2 * variance, t + 1
        r = np.exp(lam[t] - lam[s])
        noise = (1 - r) * sigma[s] ** (2 * (1 - gamma)) * sigma[t] ** (2 * gamma)
        variance *= (r * alpha[s] / alpha[t] + (1 - r) * alpha[s] * gain) ** 2
        variance += noise
    return np.sqrt(x_variance)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_ancestral_reproduces_the_moments_of_gaussian_data(gamma):
    config = SamplerConfig("ancestral", num_steps=256, gamma=gamma, threshold="none")
    x = run(gaussian_denoiser("eps"), config, range(64), null_cond(64), shape=(16, 16, 3))
    assert x.mean() == pytest.approx(MEAN, abs=0.005)
    assert x.std() == pytest.approx(ancestral_std_in_numpy(256, gamma), rel=0.01)
    # At a finite number of steps gamma = 0 falls short of the data's std and gamma = 1 exceeds it.
    assert x.std() == pytest.approx(STD, rel=0.04)


def test_ancestral_variances_bracket_the_data_and_close_in():
    few, many = ([ancestral_std_in_numpy(n, gamma) for gamma in (0.0, 1.0)] for n in (64, 1024))
    assert few[0] < many[0] < STD < many[1] < few[1]


def test_the_last_step_adds_no_noise():
    """A denoiser that knows the answer at the last time, whatever z is, gets it out unchanged."""
    answer = jnp.clip(draw(3, SHAPE), -0.9, 0.9)
    config = SamplerConfig("ancestral", num_steps=5, gamma=1.0, threshold="none")
    x = run(lambda z, *_: z * 0 + answer[None], config, [1, 2], null_cond(2), prediction="x")
    np.testing.assert_array_equal(x, jnp.broadcast_to(answer[None], x.shape))


def test_times_are_evenly_spaced_from_1_and_noise_is_standard_at_1():
    denoise, seen = recording(blank)
    run(denoise, SamplerConfig("ddim", num_steps=8), range(16), null_cond(16))
    expected = COSINE.log_snr(jnp.linspace(1, 0, 9)[:-1])
    np.testing.assert_allclose([lam for _, lam in seen], expected, atol=1e-4)
    assert seen[0][0].std() == pytest.approx(1, abs=0.05)


# Thresholding.


def dynamic_in_numpy(x, percentile):
    out = np.empty_like(x)
    for b in range(len(x)):
        s = max(1.0, np.percentile(np.abs(x[b]), percentile))
        out[b] = np.clip(x[b], -s, s) / s
    return out


@pytest.mark.parametrize("percentile", [50.0, 99.5, 100.0])
def test_dynamic_threshold_is_per_sample_and_as_in_numpy(percentile):
    x = np.asarray(draw(0, (3, 16, 16, 3))) * np.array([0.2, 1.5, 9.0])[:, None, None, None]
    x = x.astype(np.float32)
    ours = sampling.dynamic_threshold(jnp.asarray(x), percentile)
    np.testing.assert_allclose(ours, dynamic_in_numpy(x, percentile), rtol=1e-5)
    assert float(jnp.abs(ours).max()) <= 1


def test_thresholds_on_either_side_of_the_range():
    inside, outside = jnp.tanh(draw(0, (2, 8, 8, 3))), jnp.array([[-3.0, -0.5, 0.5, 3.0]])
    for threshold in sampling.THRESHOLDS.values():
        np.testing.assert_array_equal(threshold(inside, 99.5), inside)
    np.testing.assert_array_equal(sampling.static_threshold(outside, 99.5), [[-1, -0.5, 0.5, 1]])
    np.testing.assert_array_equal(sampling.no_threshold(outside, 99.5), outside)


@pytest.mark.parametrize("threshold", sampling.THRESHOLDS)
def test_the_step_uses_the_thresholded_x_hat(threshold):
    """Two DDIM steps by hand, with an x_hat far out of range."""
    config = SamplerConfig("ddim", num_steps=2, threshold=threshold)
    schedule = Schedule(log_snr_min=-6.0, log_snr_max=6.0)
    x = run(lambda z, *_: 2.0 * z, config, [4], null_cond(1), schedule, "x")
    key = jax.random.fold_in(jax.random.key(4, impl="threefry2x32"), 0)
    z = jax.random.normal(key, SHAPE)[None]
    for log_snr_t, log_snr_s in [(-6.0, 0.0), (0.0, 6.0)]:
        x_hat = sampling.THRESHOLDS[threshold](2.0 * z, 99.5)
        z = sampling.ddim_step(z, x_hat, log_snr_t, log_snr_s, None, None)
    np.testing.assert_allclose(x, jnp.clip(x_hat, -1, 1), atol=1e-5)


# Guidance.


def test_guidance_is_the_weighted_sum_of_the_two_passes():
    z, cond, log_snr = draw(0, (3, *SHAPE)), text_cond(3), jnp.float32(0.4)
    log_snr_b = jnp.full((3,), log_snr)
    with_text = text_denoiser(z, log_snr_b, cond)
    without = text_denoiser(z, log_snr_b, diffusion.drop_text(cond, jnp.ones((3,), bool)))
    assert float(jnp.abs(with_text - without).max(axis=(1, 2, 3)).min()) > 0.01
    for weight in (1.0, 0.0, 5.0):
        guided = sampling.guided_output(text_denoiser, z, log_snr, cond, weight)
        expected = weight * with_text + (1 - weight) * without
        np.testing.assert_allclose(guided, expected, atol=1e-5)


@pytest.mark.parametrize("weight, passes", [(1.0, 1), (1, 1), (2.0, 2)])
def test_guidance_costs_one_pass_more_and_none_at_weight_1(weight, passes):
    cond = text_cond(2) | {"aug_level": jnp.array([0.1, 0.2])}
    seen = []

    def spy(z, log_snr_b, cond):
        seen.append((len(z), len(log_snr_b), len(cond["text"]), cond["aug_level"]))
        return z

    sampling.guided_output(spy, draw(0, (2, *SHAPE)), jnp.float32(0), cond, weight)
    (*sizes, aug_level), *more = seen
    assert sizes == [2 * passes] * 3 and not more
    np.testing.assert_allclose(aug_level, np.repeat([0.1, 0.2], passes), rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guiding_the_output_is_guiding_eps(prediction):
    z, cond, log_snr = draw(0, (3, *SHAPE)), text_cond(3), jnp.float32(0.4)

    def denoise(z, log_snr_b, cond):
        eps_hat = text_denoiser(z, log_snr_b, cond)
        x_hat, _ = PREDICTIONS["eps"].to_x_eps(eps_hat, z, log_snr_b)
        return PREDICTIONS[prediction].target(x_hat, eps_hat, log_snr_b)

    output = sampling.guided_output(denoise, z, log_snr, cond, 4.0)
    _, eps_hat = PREDICTIONS[prediction].to_x_eps(output, z, log_snr)
    expected = sampling.guided_output(text_denoiser, z, log_snr, cond, 4.0)
    np.testing.assert_allclose(eps_hat, expected, atol=1e-4)


# Seeds.


@pytest.mark.parametrize("name", sampling.STEPS)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_sample_depends_on_its_seed_and_prompt_not_on_its_batch(name, weight):
    config = SamplerConfig(name, num_steps=6, guidance_weight=weight)
    cond = text_cond(4)
    seeds = np.array([11, 7, 2**32 - 1, 11])
    batch = run(text_denoiser, config, seeds, cond)
    for b in range(4):
        one = slice(b, b + 1)
        alone = run(text_denoiser, config, seeds[one], {k: v[one] for k, v in cond.items()})
        np.testing.assert_allclose(alone[0], batch[b], atol=1e-6)


def test_seeds_differ_and_repeat():
    config = SamplerConfig("ancestral", num_steps=3, gamma=1.0, threshold="none")
    x = run(gaussian_denoiser("eps"), config, [0, 1, 0], null_cond(3))
    np.testing.assert_array_equal(x[0], x[2])
    assert float(jnp.abs(x[0] - x[1]).mean()) > 0.05


def test_every_step_draws_fresh_noise():
    """From t = 1 to 2/3 the mean keeps e^{-10} of z_t; with x_hat = 0 the rest is new noise."""
    denoise, seen = recording(blank)
    config = SamplerConfig("ancestral", num_steps=3, gamma=1.0, threshold="none")
    run(denoise, config, [5], null_cond(1), COSINE, "x", (64, 64, 3))
    z_1, z_2 = (z.ravel() for z, _ in seen[:2])
    assert abs(np.corrcoef(z_1, z_2)[0, 1]) < 0.05


# Configuration.


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("name", "dpm", "ddim, ancestral"),
        ("variance", "log", "geometric, linear"),
        ("threshold", "clip", "none, static, dynamic"),
        ("num_steps", 0, "1 or more"),
        ("gamma", 1.5, "[0, 1]"),
        ("gamma", float("nan"), "[0, 1]"),
        ("guidance_weight", -1.0, "0 or more"),
        ("guidance_weight", float("inf"), "finite"),
        ("threshold_percentile", 0.0, "(0, 100]"),
        ("threshold_percentile", 101.0, "(0, 100]"),
    ],
)
def test_a_bad_value_names_key_value_and_what_is_allowed(field, value, allowed):
    with pytest.raises(UserError) as error:
        SamplerConfig(**{field: value})
    message = str(error.value)
    assert f"sampling.{field} is {value!r}" in message and allowed in message
    assert "\n" not in message


def test_an_unknown_prediction_is_a_user_error():
    with pytest.raises(UserError, match=r"diffusion.prediction is 'flow'"):
        run(text_denoiser, SamplerConfig(), [0], text_cond(1), prediction="flow")


@pytest.mark.parametrize("name", sampling.STEPS)
@pytest.mark.parametrize("threshold", sampling.THRESHOLDS)
def test_samples_are_float32_in_range_without_rank_promotion(name, threshold):
    def denoise(*inputs):
        return text_denoiser(*inputs).astype(jnp.bfloat16)

    config = SamplerConfig(name, num_steps=4, guidance_weight=8.0, threshold=threshold)
    with jax.numpy_rank_promotion("raise"):
        x = run(denoise, config, range(2), text_cond(2), Schedule("linear"), "v")
    assert x.dtype == jnp.float32 and x.shape == (2, *SHAPE)
    assert float(jnp.abs(x).max()) <= 1
