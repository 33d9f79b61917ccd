"""Thresholding, spacing, seeds and sampling settings, with every solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_config
from denoisers import (
    COSINE,
    SHAPE,
    Gaussian,
    blank,
    first_noise,
    normal,
    null_cond,
    recording,
    run,
    text_cond,
    text_denoiser,
)

from imagen_jax.common.errors import UserError
from imagen_jax.common.typed_config import typed
from imagen_jax.config import parse
from imagen_jax.diffusion import sampler, solvers
from imagen_jax.diffusion.process import PREDICTIONS, Schedule, draw_noise, seed_keys
from imagen_jax.diffusion.sampler import SPACINGS, SamplerConfig
from imagen_jax.diffusion.solvers import SOLVERS


@pytest.mark.parametrize("name", SOLVERS)
def test_the_sample_is_the_last_x_hat_and_has_no_noise(name):
    """If the denoiser returns the same x_hat for every z, the sample is exactly that x_hat."""
    answer = jnp.clip(normal(3, SHAPE), -0.9, 0.9)
    config = SamplerConfig(name, num_steps=5, gamma=1.0, threshold="none")
    x = run(lambda z, *_: z * 0 + answer[None], config, [1, 2], null_cond(2), prediction="x")
    np.testing.assert_array_equal(x, jnp.broadcast_to(answer[None], x.shape))


@pytest.mark.parametrize("schedule", ["cosine", "linear", "flow"])
def test_spacings_share_their_ends_and_are_uniform_in_their_variable(schedule):
    schedule = Schedule(schedule)
    t, log_snr = (SPACINGS[name](schedule, 0.8, 10) for name in ("t", "log_snr"))
    np.testing.assert_allclose(t, schedule.log_snr(jnp.linspace(0.8, 0, 11)), rtol=1e-6)
    np.testing.assert_allclose(np.diff(log_snr), (t[-1] - t[0]) / 10, rtol=1e-4)
    np.testing.assert_allclose(log_snr[jnp.array([0, -1])], t[jnp.array([0, -1])], rtol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_of_the_same_denoiser_gives_the_same_sample(prediction):
    gaussian = Gaussian(np.geomspace(0.1, 0.3, 12))
    scale = PREDICTIONS[prediction].input_scale

    def denoise(z, log_snr_b, cond):
        z = z / scale(log_snr_b)[:, None, None, None]
        return gaussian.denoiser(prediction)(z, log_snr_b, cond)

    config = SamplerConfig("ddim", num_steps=64, threshold="none")
    x = run(denoise, config, range(4), null_cond(4), COSINE, prediction, gaussian.shape)
    exact = gaussian.x_hat_on_the_flow(first_noise(range(4), gaussian.shape), -20.0, 20.0)
    np.testing.assert_allclose(x.reshape(4, -1), exact, atol=0.03)


def dynamic_in_numpy(x, percentile):
    out = np.empty_like(x)
    for b in range(len(x)):
        s = max(1.0, np.percentile(np.abs(x[b]), percentile))
        out[b] = np.clip(x[b], -s, s) / s
    return out


@pytest.mark.parametrize("percentile", [50.0, 99.5, 100.0])
def test_dynamic_threshold_is_per_sample_and_matches_numpy(percentile):
    x = np.asarray(normal(0, (3, 16, 16, 3))) * np.array([0.2, 1.5, 9.0])[:, None, None, None]
    x = x.astype(np.float32)
    ours = sampler.dynamic_threshold(jnp.asarray(x), percentile)
    np.testing.assert_allclose(ours, dynamic_in_numpy(x, percentile), rtol=1e-5)
    assert float(jnp.abs(ours).max()) <= 1


def test_thresholds_change_only_values_out_of_range():
    inside, outside = jnp.tanh(normal(0, (2, 8, 8, 3))), jnp.array([[-3.0, -0.5, 0.5, 3.0]])
    for threshold in sampler.THRESHOLDS.values():
        np.testing.assert_array_equal(threshold(inside, 99.5), inside)
    np.testing.assert_array_equal(sampler.static_threshold(outside, 99.5), [[-1, -0.5, 0.5, 1]])
    np.testing.assert_array_equal(sampler.no_threshold(outside, 99.5), outside)


@pytest.mark.parametrize("threshold", sampler.THRESHOLDS)
def test_the_step_uses_the_thresholded_x_hat(threshold):
    """Against two DDIM steps computed here, with x_hat far out of range."""
    config = SamplerConfig("ddim", num_steps=2, threshold=threshold)
    schedule = Schedule(log_snr_min=-6.0, log_snr_max=6.0)
    x = run(lambda z, *_: 2.0 * z, config, [4], null_cond(1), schedule, "x")
    keys_b = seed_keys(np.array([4], np.uint32))
    z = draw_noise(keys_b, SHAPE, 0)
    for log_snr_t, log_snr_s in [(-6.0, 0.0), (0.0, 6.0)]:
        x_hat = sampler.THRESHOLDS[threshold](2.0 * z, 99.5)
        z = solvers.ddim(z, x_hat, log_snr_t, log_snr_s)
    np.testing.assert_allclose(x, jnp.clip(x_hat, -1, 1), atol=1e-5)


@pytest.mark.parametrize("name, weight", [("ddim", 1.0), *((name, 3.0) for name in SOLVERS)])
def test_a_sample_depends_on_its_seed_and_prompt_not_on_its_batch(name, weight):
    config = SamplerConfig(name, num_steps=6, guidance_weight=weight)
    cond = text_cond(4)
    seeds = np.array([11, 7, 2**32 - 1, 11])
    batch = run(text_denoiser, config, seeds, cond)
    for b in range(4):
        one = slice(b, b + 1)
        alone = run(text_denoiser, config, seeds[one], {k: v[one] for k, v in cond.items()})
        np.testing.assert_allclose(alone[0], batch[b], atol=1e-6)


def test_streams_of_a_seed_are_uncorrelated():
    keys = [seed_keys(jnp.arange(2), stream) for stream in range(3)]
    noise = np.stack([draw_noise(k, (16, 16, 3), i) for k in keys for i in (0, 1)])
    assert np.abs(np.corrcoef(noise.reshape(12, -1)) - np.eye(12)).max() < 0.15


def test_equal_seeds_repeat_and_different_seeds_differ():
    config = SamplerConfig("ancestral", num_steps=3, gamma=1.0, threshold="none")
    x = run(lambda z, *_: z, config, [0, 1, 0], null_cond(3))
    np.testing.assert_array_equal(x[0], x[2])
    assert float(jnp.abs(x[0] - x[1]).mean()) > 0.05


def test_every_step_uses_new_noise():
    """From t = 1 to 2/3 the mean keeps e^-10 of z_t; with x_hat = 0 the rest is new noise."""
    denoise, seen = recording(blank)
    config = SamplerConfig("ancestral", num_steps=3, gamma=1.0, threshold="none")
    run(denoise, config, [5], null_cond(1), COSINE, "x", (64, 64, 3))
    z_1, z_2 = (z.ravel() for z, _ in seen[:2])
    assert abs(np.corrcoef(z_1, z_2)[0, 1]) < 0.05


@pytest.mark.parametrize(
    "field, value, allowed",
    [
        ("name", "dpm", ", ".join(SOLVERS)),
        ("spacing", "sigma", "t, log_snr"),
        ("guidance_interval", (1.0, 1.0), "(low, high) with low < high"),
        ("guidance_interval", (1.0,), "(low, high) with low < high"),
        ("guidance_rescale", 1.5, "[0, 1]"),
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


def test_an_interval_may_be_a_list_as_in_json():
    config = typed(SamplerConfig, {"guidance_interval": [-3, 4]}, "sampling.")
    assert config.guidance_interval == (-3.0, 4.0) and hash(config)


@pytest.mark.parametrize("argument", ["", "tiny"])
@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_shipped_configs_with_few_steps_use_a_second_order_solver_over_log_snr(file, argument):
    """With 64 steps or fewer, first order or steps uniform in t have many times the error."""
    if argument and f'"{argument}"' not in file.read_text():
        pytest.skip("the config has no such size")
    sampling = parse(load_config(file.stem, argument)).sampling
    if sampling.num_steps <= 64:
        assert (sampling.name, sampling.spacing) == ("dpmpp_2m", "log_snr")


def test_an_unknown_prediction_is_a_user_error():
    with pytest.raises(UserError, match=r"diffusion.prediction is 'noise'"):
        run(text_denoiser, SamplerConfig(), [0], text_cond(1), prediction="noise")


@pytest.mark.parametrize(
    "name, threshold", [("ddim", "none"), ("heun", "static"), *((n, "dynamic") for n in SOLVERS)]
)
def test_samples_are_float32_in_range_without_rank_promotion(name, threshold):
    def denoise(*inputs):
        return text_denoiser(*inputs).astype(jnp.bfloat16)

    config = SamplerConfig(name, num_steps=4, guidance_weight=8.0, threshold=threshold)
    with jax.numpy_rank_promotion("raise"):
        x = run(denoise, config, range(2), text_cond(2), Schedule("linear"), "v")
    assert x.dtype == jnp.float32 and x.shape == (2, *SHAPE)
    assert float(jnp.abs(x).max()) <= 1
