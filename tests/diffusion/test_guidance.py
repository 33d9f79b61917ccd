"""Classifier-free guidance: weight, interval, negative prompts, rescaling, one pass or two."""

import jax.numpy as jnp
import numpy as np
import pytest
from denoisers import SHAPE, normal, null_cond, recording, run, text_cond, text_denoiser

from imagen_jax.diffusion import guidance
from imagen_jax.diffusion.conditioning import drop_text
from imagen_jax.diffusion.process import PREDICTIONS
from imagen_jax.diffusion.sampler import SamplerConfig

LOG_SNR = jnp.float32(0.4)


def passes(z, cond, batch=3):
    """Computes the two outputs of text_denoiser separately."""
    log_snr_b = jnp.full((batch,), LOG_SNR)
    null = drop_text(cond, jnp.ones((batch,), bool))
    return text_denoiser(z, log_snr_b, cond), text_denoiser(z, log_snr_b, null)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("weight", [1.0, 0.0, 5.0])
def test_guidance_is_the_weighted_sum_of_the_two_passes(weight, batched):
    z, cond = normal(0, (3, *SHAPE)), text_cond(3)
    with_text, without = passes(z, cond)
    assert float(jnp.abs(with_text - without).max(axis=(1, 2, 3)).min()) > 0.01
    guided, conditional = guidance.guided_output(
        text_denoiser, z, LOG_SNR, cond, weight, batched=batched
    )
    np.testing.assert_allclose(guided, weight * with_text + (1 - weight) * without, atol=1e-5)
    np.testing.assert_allclose(conditional, with_text, atol=1e-5)


@pytest.mark.parametrize(
    "weight, batched, sizes",
    [(1.0, True, [2]), (1, False, [2]), (2.0, True, [4]), (2.0, False, [2, 2])],
)
def test_guidance_evaluates_two_passes_in_one_batch_or_two(weight, batched, sizes):
    cond = text_cond(2) | {"aug_level": jnp.array([0.1, 0.2]), "low_res": normal(1, (2, 4, 4, 3))}
    config = SamplerConfig(num_steps=1, guidance_weight=weight, guidance_batched=batched)
    received = []

    def denoise(z, log_snr_b, cond):
        received.append({k: v.shape for k, v in (cond | {"log_snr": log_snr_b}).items()})
        return z + cond["aug_level"][:, None, None, None] * cond["low_res"].mean()

    spy, seen = recording(denoise)
    run(spy, config, range(2), cond)
    assert [len(z) for z, _ in seen] == sizes
    expected = {k: (sizes[0], *v.shape[1:]) for k, v in cond.items()} | {"log_snr": (sizes[0],)}
    assert all(shapes == expected for shapes in received)


def test_both_passes_of_a_sample_get_its_other_conditioning():
    cond = text_cond(2) | {"aug_level": jnp.array([0.1, 0.2])}

    def denoise(z, log_snr_b, cond):
        return jnp.broadcast_to(cond["aug_level"][:, None, None, None], z.shape)

    for batched in (True, False):
        outputs = guidance.both_outputs(denoise, normal(0, (2, *SHAPE)), LOG_SNR, cond, batched)
        for output in outputs:
            np.testing.assert_allclose(output[:, 0, 0, 0], [0.1, 0.2], rtol=1e-6)


@pytest.mark.parametrize(
    "log_snr, inside", [(-2.1, False), (-2.0, True), (1.0, True), (1.1, False)]
)
def test_the_weight_is_1_outside_the_guidance_interval(log_snr, inside):
    z, cond = normal(0, (3, *SHAPE)), text_cond(3)
    arguments = text_denoiser, z, jnp.float32(log_snr), cond
    guided, _ = guidance.guided_output(*arguments, 5.0, interval=(-2.0, 1.0))
    expected, _ = guidance.guided_output(*arguments, 5.0 if inside else 1.0)
    np.testing.assert_allclose(guided, expected, atol=1e-5)


@pytest.mark.parametrize("batched", [True, False])
def test_a_negative_prompt_replaces_the_null_prompt(batched):
    z, cond, other = normal(0, (3, *SHAPE)), text_cond(3), text_cond(3, seed=8)
    negative = {"negative_text": other["text"], "negative_text_mask": other["text_mask"]}
    with_text, _ = passes(z, cond)
    against, _ = passes(z, other)
    for weight in (0.0, 1.0, 4.0):
        guided, _ = guidance.guided_output(
            text_denoiser, z, LOG_SNR, cond | negative, weight, batched=batched
        )
        np.testing.assert_allclose(guided, weight * with_text + (1 - weight) * against, atol=1e-5)


def test_the_denoiser_does_not_get_the_negative_prompt():
    cond = null_cond(2)
    cond |= {"negative_text": cond["text"], "negative_text_mask": cond["text_mask"]}
    for passed in guidance.both_conds(cond):
        assert set(passed) == {"text", "text_mask"}


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_is_guided_as_eps_is(prediction):
    z, cond, entry = normal(0, (3, *SHAPE)), text_cond(3), PREDICTIONS[prediction]

    def denoise(z_seen, log_snr_b, cond):
        eps_hat = text_denoiser(z, log_snr_b, cond)
        x_hat, _ = PREDICTIONS["eps"].to_x_eps(eps_hat, z, log_snr_b)
        return entry.target(x_hat, eps_hat, log_snr_b)

    x_hat = guidance.guided_x_hat(denoise, entry, z, LOG_SNR, cond, weight=4.0, batched=False)
    eps_hat, _ = guidance.guided_output(text_denoiser, z, LOG_SNR, cond, 4.0)
    expected, _ = PREDICTIONS["eps"].to_x_eps(eps_hat, z, LOG_SNR)
    np.testing.assert_allclose(x_hat, expected, atol=1e-4)


def test_the_network_reads_the_scaled_input():
    entry, z = PREDICTIONS["edm"], normal(0, (2, *SHAPE))
    seen = []

    def denoise(z, log_snr_b, cond):
        seen.append(z)
        return z

    guidance.guided_x_hat(denoise, entry, z, LOG_SNR, null_cond(2), weight=1.0)
    np.testing.assert_allclose(seen[0], entry.input_scale(LOG_SNR) * z, rtol=1e-5)


def test_rescaling_restores_the_contrast_of_the_conditional_output():
    guided, conditional = 3 * normal(0, (2, *SHAPE)) + 0.5, normal(1, (2, *SHAPE))
    stds = [np.asarray(a).std(axis=(1, 2, 3)) for a in (guided, conditional)]
    for strength in (0.0, 0.7, 1.0):
        rescaled = np.asarray(guidance.rescale(guided, conditional, strength))
        expected = (1 - strength) * stds[0] + strength * stds[1]
        np.testing.assert_allclose(rescaled.std(axis=(1, 2, 3)), expected, rtol=1e-4)
        factor = rescaled / np.asarray(guided)
        np.testing.assert_allclose(factor, factor[:, :1, :1, :1] * np.ones(SHAPE), rtol=1e-4)
    assert bool(jnp.isfinite(guidance.rescale(0 * guided, conditional, 1.0)).all())


def test_the_sampler_rescales_x_hat():
    """After one step from pure noise the sample has the contrast of the conditional sample."""
    cond = text_cond(2)

    def denoise(z, log_snr_b, cond):
        return 0.05 * text_denoiser(z, log_snr_b, cond)

    def contrast(**options):
        config = SamplerConfig(num_steps=1, threshold="none", **options)
        x = run(denoise, config, range(2), cond, prediction="x")
        return np.asarray(x).std(axis=(1, 2, 3))

    plain = contrast()
    assert not np.allclose(contrast(guidance_weight=6.0), plain, rtol=0.1)
    np.testing.assert_allclose(
        contrast(guidance_weight=6.0, guidance_rescale=1.0), plain, rtol=1e-3
    )


def test_the_sampler_guides_only_inside_the_interval():
    cond = text_cond(2)
    plain, never, once, always = (
        run(text_denoiser, SamplerConfig(num_steps=4, **options), range(2), cond)
        for options in (
            {},
            {"guidance_weight": 4.0, "guidance_interval": (25.0, 30.0)},
            {"guidance_weight": 4.0, "guidance_interval": (-1.0, 1.0)},
            {"guidance_weight": 4.0},
        )
    )
    np.testing.assert_allclose(never, plain, atol=1e-5)
    assert min(float(jnp.abs(once - other).mean()) for other in (plain, always)) > 0.01


def test_two_passes_give_the_same_sample_as_one_batch():
    options = {"guidance_weight": 4.0, "guidance_interval": (-5.0, 5.0), "guidance_rescale": 0.5}
    x, y = (
        run(
            text_denoiser,
            SamplerConfig(num_steps=6, guidance_batched=batched, **options),
            range(3),
            text_cond(3),
        )
        for batched in (True, False)
    )
    np.testing.assert_allclose(x, y, atol=1e-5)
