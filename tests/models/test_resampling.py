"""Resampling: values and gradients, and whether a network with our upsampling can predict noise."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from denoisers import null_cond, run

from imagen_jax.diffusion import process
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.models import resampling
from imagen_jax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from imagen_jax.models.networks import functional

BATCH, SIZE = 16, 8
NOISY = -10.0  # the log-SNR at which z is nearly pure noise


def test_patches_fold_and_unfold_without_loss():
    x = jnp.arange(2 * 8 * 4 * 3.0).reshape(2, 8, 4, 3)
    folded = resampling.space_to_depth(x, 2)
    assert folded.shape == (2, 4, 2, 12)
    # One output pixel holds one square of input pixels.
    np.testing.assert_array_equal(folded[0, 1, 0], x[0, 2:4, 0:2].reshape(-1))
    np.testing.assert_array_equal(resampling.depth_to_space(folded, 2), x)
    np.testing.assert_array_equal(resampling.space_to_depth(x, 1), x)


def test_resampling_and_its_gradients_are_means_and_sums_of_2x2_pixels():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6, 3))
    half = resampling.downsample(x)
    blocks = np.asarray(x).reshape(2, 2, 2, 3, 2, 3)
    np.testing.assert_allclose(half, blocks.mean((2, 4)), rtol=1e-6, atol=1e-6)
    enlarged, pull = jax.vjp(resampling.upsample, half)
    np.testing.assert_array_equal(enlarged[:, ::2, 1::2], half)
    np.testing.assert_allclose(pull(x)[0], blocks.sum((2, 4)), rtol=1e-6, atol=1e-6)
    (gradient,) = jax.vjp(resampling.downsample, x)[1](half)
    np.testing.assert_allclose(4 * gradient, enlarged, rtol=1e-6)
    x_bf16 = x.astype(jnp.bfloat16)
    (gradient,) = jax.vjp(resampling.upsample, resampling.downsample(x_bf16))[1](x_bf16)
    assert resampling.downsample(x_bf16).dtype == gradient.dtype == jnp.bfloat16


def test_a_transposed_convolution_adds_a_weighted_3x3_square_for_each_pixel():
    keys = jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (2, 3, 4, 5)), jax.random.normal(keys[1], (3, 3, 5, 7))
    expected = np.zeros((2, 7, 9, 7), np.float32)
    for y, x_ in np.ndindex(3, 4):
        square = np.einsum("bc,ijcd->bijd", x[:, y, x_], kernel)
        expected[:, 2 * y : 2 * y + 3, 2 * x_ : 2 * x_ + 3] += square
    np.testing.assert_allclose(
        resampling.conv_transpose(x, kernel), expected[:, :6, :8], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_transposed_convolution_is_jaxs(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, 3, 4, 5), (3, 3, 5, 7), (2, 6, 8, 7)]
    x, kernel, g = (
        jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes, strict=True)
    )
    own = jax.vjp(resampling.conv_transpose, x, kernel)[1](g)
    # The function inside the custom_vjp, which JAX differentiates itself.
    expected = jax.vjp(resampling.conv_transpose.fun, x, kernel)[1](g)
    for one, other in zip(own, expected, strict=True):
        assert one.dtype == other.dtype == jnp.dtype(dtype) and one.shape == other.shape
        one, other = (a.astype(jnp.float32) for a in (one, other))
        scale = jnp.abs(other).max()
        np.testing.assert_allclose(one, other, atol=scale * (1e-5 if dtype == "float32" else 0.02))


@pytest.fixture(scope="module")
def noise_network():
    """z -> eps of a tiny Efficient U-Net trained where z is nearly pure noise, and its last MSE."""
    width = 32
    config = EfficientUNetConfig(
        image_size=SIZE,
        low_res=SIZE // 2,
        cond_width=width,
        widths=(width,),
        num_res_blocks=(1,),
        num_heads=2,
        pooling="none",
        sequence="none",
        self_attention=False,
        dtype="float32",
    )
    network = functional(lambda rngs: EfficientUNet(config, rngs=rngs))
    optimizer = optax.adam(5e-3)

    def predict(params, z):
        cond = {
            "low_res": jnp.zeros((len(z), SIZE // 2, SIZE // 2, 3)),
            "aug_level": jnp.zeros(len(z)),
        }
        return network.apply(params, z, jnp.full(len(z), NOISY), cond)

    def loss(params, z):
        return jnp.square(predict(params, z) - z).mean()

    @jax.jit
    def step(params, opt_state, key):
        z = jax.random.normal(key, (BATCH, SIZE, SIZE, 3))
        value, grads = jax.value_and_grad(loss)(params, z)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, value

    params = jax.jit(network.init)(jax.random.key(0))
    opt_state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), 150):
        params, opt_state, value = step(params, opt_state, key)
    return lambda z: predict(params, z), float(value)


def test_the_efficient_unet_learns_to_predict_noise(noise_network):
    """With nearest-neighbor upsampling and one convolution, the loss stays above 0.08."""
    _, mse = noise_network
    assert mse < 0.03


def test_a_sampled_uniform_image_has_no_noise_left(noise_network):
    """Sampling removes only the noise that the network can predict."""
    predict, _ = noise_network
    color = jnp.array([0.3, -0.2, 0.5])

    def denoise(z, log_snr_b, cond):
        alpha, sigma = (a[:, None, None, None] for a in process.alpha_sigma(log_snr_b))
        return predict((z - alpha * color[None, None, None, :]) / sigma)

    sampler = SamplerConfig("ddim", num_steps=32, threshold="static")
    x = run(denoise, sampler, np.arange(4), null_cond(4), shape=(SIZE, SIZE, 3))
    gray_levels = 127.5 * jnp.sqrt(jnp.square(x - color[None, None, None, :]).mean())
    assert gray_levels < 1
