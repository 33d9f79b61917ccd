"""Image to image, inpainting and interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import (
    COSINE,
    SHAPE,
    Gaussian,
    first_noise,
    jitted,
    normal,
    null_cond,
    recording,
    run,
    text_cond,
    text_denoiser,
)

from imagen_jax.common.errors import UserError
from imagen_jax.diffusion import editing, process
from imagen_jax.diffusion.sampler import SPACINGS, SamplerConfig

STATIC = ("shape",)
GAUSSIAN = Gaussian(np.geomspace(0.1, 0.3, 12))


def edit(function, denoise, config, seeds, prediction="eps", **arguments):
    """Runs a function of `editing`, compiled, with the cosine schedule."""
    static = tuple(name for name in STATIC if name in arguments)
    compiled = jitted(function, static, denoise, COSINE, prediction, config)
    x = compiled(jnp.asarray(seeds, jnp.uint32), **arguments)
    jax.effects_barrier()
    return x


def image(batch, seed=3):
    return jnp.tanh(normal(seed, (batch, *SHAPE)))


def half(batch):
    """A mask that selects the right half."""
    return jnp.broadcast_to(jnp.arange(SHAPE[1])[None, None, :, None] >= 4, (batch, 8, 8, 1))


@pytest.mark.parametrize("strength", [0.05, 1.0])
def test_image_to_image_starts_from_the_noised_image(strength):
    denoise, seen = recording(text_denoiser)
    config = SamplerConfig(num_steps=3, strength=strength)
    arguments = {"image_bhwc": image(2), "cond": text_cond(2)}
    x = edit(editing.image_to_image, denoise, config, [1, 2], **arguments)
    grid = SPACINGS["t"](COSINE, strength, 3)
    expected = process.q_sample(image(2), first_noise([1, 2], SHAPE), grid[0])
    np.testing.assert_allclose(seen[0][0], expected, atol=1e-5)
    np.testing.assert_allclose([lam for _, lam in seen], grid[:-1], atol=1e-4)
    assert x.shape == (2, *SHAPE) and x.dtype == jnp.float32


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "heun"])
def test_image_to_image_follows_the_exact_flow_of_gaussian_data(name):
    config = SamplerConfig(name, 64, spacing="log_snr", threshold="none", strength=0.3)
    start = jnp.full((4, *GAUSSIAN.shape), 0.2)
    x = edit(
        editing.image_to_image,
        GAUSSIAN.denoiser("v"),
        config,
        range(4),
        "v",
        image_bhwc=start,
        cond=null_cond(4),
    )
    log_snr = COSINE.log_snr(jnp.float32(0.3))
    z = process.q_sample(start, first_noise(range(4), GAUSSIAN.shape), log_snr)
    exact = GAUSSIAN.x_hat_on_the_flow(z, log_snr, 20.0)
    atol = {"ddim": 0.02, "dpmpp_2m": 0.001, "heun": 0.004}[name]
    np.testing.assert_allclose(x.reshape(4, -1), exact, atol=atol)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"strength": 0.0}, r"sampling.strength is 0.0; allowed: \(0, 1\]"),
        ({"strength": 1.1}, r"sampling.strength is 1.1; allowed: \(0, 1\]"),
        ({"resample": 0}, "sampling.resample is 0; allowed: 1 or more"),
    ],
)
def test_a_bad_setting_is_a_user_error(changes, words):
    with pytest.raises(UserError, match=words):
        SamplerConfig(**changes)


@pytest.mark.parametrize(
    "name, resample", [("ddim", 1), ("ancestral", 1), ("dpmpp_2m", 3), ("heun", 3)]
)
def test_inpainting_leaves_pixels_outside_the_mask_unchanged(name, resample):
    config = SamplerConfig(name, num_steps=4, guidance_weight=3.0, resample=resample)
    arguments = {"image_bhwc": image(2), "mask_bhw1": half(2), "cond": text_cond(2)}
    x = edit(editing.inpaint, text_denoiser, config, [1, 2], **arguments)
    np.testing.assert_array_equal(x[:, :, :4], image(2)[:, :, :4])
    assert bool(jnp.isfinite(x).all()) and float(jnp.abs(x).max()) <= 1
    assert float(jnp.abs(x - image(2))[:, :, 4:].mean()) > 0.1


def test_inpainting_a_full_mask_equals_sampling():
    config = SamplerConfig("ancestral", num_steps=5, gamma=1.0)
    arguments = {"image_bhwc": image(2), "mask_bhw1": jnp.ones((2, 8, 8, 1), bool)}
    x = edit(editing.inpaint, text_denoiser, config, [1, 2], cond=text_cond(2), **arguments)
    np.testing.assert_allclose(x, run(text_denoiser, config, [1, 2], text_cond(2)), atol=1e-6)


def test_known_pixels_have_the_noise_level_of_each_evaluation():
    known, size = 0.5, (32, 32, 3)
    denoise, seen = recording(lambda z, *_: jnp.zeros_like(z))
    edit(
        editing.inpaint,
        denoise,
        SamplerConfig("ddim", num_steps=4, resample=2),
        [7],
        "x",
        image_bhwc=jnp.full((1, *size), known),
        mask_bhw1=jnp.zeros((1, 32, 32, 1), bool),
        cond=null_cond(1),
    )
    assert len(seen) == 8
    for z, log_snr in seen:
        alpha, sigma = process.alpha_sigma(log_snr)
        assert z.mean() == pytest.approx(float(alpha) * known, abs=4 * float(sigma) / 55)
        assert z.std() == pytest.approx(float(sigma), rel=0.06)
    noises = np.stack([np.asarray(z).ravel() for z, _ in seen])
    assert np.abs(np.corrcoef(noises) - np.eye(8))[:2, :2].max() < 0.1


def test_resampling_adapts_the_new_pixels_to_the_known_ones():
    """The data are pairs of nearly equal pixels, so the known one determines the other."""
    pairs = Gaussian([0.3, 0.02])
    pairs.mean, pairs.axes = np.zeros(2), np.array([[1, 1], [1, -1]]) / np.sqrt(2)
    original = jnp.broadcast_to(jnp.array([0.35, -0.9])[None, None, :, None], (32, 1, 2, 1))
    mask = jnp.broadcast_to(jnp.array([False, True])[None, None, :, None], original.shape)
    errors = []
    for resample in (1, 10):
        plain = {"gamma": 0.0, "threshold": "none", "resample": resample}
        x = edit(
            editing.inpaint,
            pairs.denoiser("x"),
            SamplerConfig("ancestral", num_steps=32, **plain),
            range(32),
            "x",
            image_bhwc=original,
            mask_bhw1=mask,
            cond=null_cond(32),
        )
        errors.append(float(jnp.abs(x[:, 0, 1, 0] - 0.35).mean()))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 0.06


def test_q_sample_then_q_step_is_q_sample():
    """q(z_s | x), then q(z_t | z_s), has the moments of q(z_t | x); no jump changes nothing."""
    x, eps, noise = 0.7, normal(0, (100_000,)), normal(1, (100_000,))
    z_s = process.q_sample(jnp.full_like(eps, x), eps, jnp.float32(2.0))
    z_t = editing.q_step(z_s, noise, jnp.float32(2.0), jnp.float32(-1.0))
    alpha, sigma = process.alpha_sigma(jnp.float32(-1.0))
    assert z_t.mean() == pytest.approx(float(alpha) * x, abs=0.015)
    assert z_t.std() == pytest.approx(float(sigma), rel=0.01)
    np.testing.assert_array_equal(editing.q_step(z_s, noise, 2.0, 2.0), z_s)


def test_slerp_is_the_arc_between_its_ends():
    a, b = normal(0, (5, 4, 4, 3)), normal(1, (5, 4, 4, 3))
    fraction_b = jnp.array([0.0, 0.3, 0.5, 0.8, 1.0])
    result = np.asarray(editing.slerp(a, b, fraction_b), np.float64).reshape(5, -1)
    a, b = (np.asarray(v, np.float64).reshape(5, -1) for v in (a, b))
    for i, f in enumerate(np.asarray(fraction_b, np.float64)):
        angle = np.arccos(a[i] @ b[i] / np.linalg.norm(a[i]) / np.linalg.norm(b[i]))
        expected = (np.sin((1 - f) * angle) * a[i] + np.sin(f * angle) * b[i]) / np.sin(angle)
        np.testing.assert_allclose(result[i], expected, atol=1e-5)


def test_slerp_between_equal_inputs_returns_them():
    a = normal(0, (2, 4, 4, 3))
    np.testing.assert_allclose(editing.slerp(a, a, jnp.array([0.3, 0.5])), a, atol=1e-5)


@pytest.mark.parametrize("name", ["heun", "ancestral"])
def test_interpolation_ends_at_the_samples_of_the_two_seeds(name):
    config = SamplerConfig(name, num_steps=5, gamma=1.0)
    cond = {k: jnp.repeat(v[:1], 3, axis=0) for k, v in text_cond(1).items()}
    x = edit(
        editing.interpolate,
        text_denoiser,
        config,
        [4, 4, 4],
        other_seeds_b=jnp.array([9, 9, 9], jnp.uint32),
        fraction_b=jnp.array([0.0, 0.5, 1.0]),
        shape=SHAPE,
        cond=cond,
    )
    first, _, last = run(text_denoiser, config, [4, 4, 9], cond)
    np.testing.assert_allclose(x[0], first, atol=1e-5)
    np.testing.assert_allclose(x[2], last, atol=1e-5)
    assert min(float(jnp.abs(x[1] - end).mean()) for end in (first, last)) > 0.01


@pytest.mark.parametrize("function", [editing.image_to_image, editing.inpaint, editing.interpolate])
def test_an_edit_depends_on_its_own_seed_and_image_not_on_its_batch(function):
    options = {
        editing.image_to_image: {"image_bhwc": image(3)},
        editing.inpaint: {"image_bhwc": image(3), "mask_bhw1": half(3)},
        editing.interpolate: {
            "other_seeds_b": jnp.arange(7, 10, dtype=jnp.uint32),
            "fraction_b": jnp.array([0.2, 0.5, 0.9]),
            "shape": SHAPE,
        },
    }[function] | {"cond": text_cond(3)}
    config = SamplerConfig("ancestral", 4, guidance_weight=2.0, strength=0.7, resample=2)
    seeds = np.array([11, 7, 11])
    batch = edit(function, text_denoiser, config, seeds, **options)
    static = {k: v for k, v in options.items() if k in STATIC}
    last = {k: v for k, v in options.items() if k not in STATIC}
    last = jax.tree.map(lambda v: v[2:], last)
    alone = edit(function, text_denoiser, config, seeds[2:], **last, **static)
    np.testing.assert_allclose(alone[0], batch[2], atol=1e-6)
