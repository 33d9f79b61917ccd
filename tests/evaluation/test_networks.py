"""Layers and resizing of the frozen networks; tests/parity compares whole networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.evaluation.features import pillow_bicubic, tf1_bilinear
from imagen_jax.evaluation.networks.layers import DepthwiseConv


@pytest.mark.parametrize(("height", "width"), [(8, 7), (5, 12)])
@pytest.mark.parametrize(("side", "stride"), [(3, 1), (3, 2), (5, 1), (5, 2)])
def test_a_depthwise_convolution_equals_a_grouped_one(side, stride, height, width):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, height, width, 4)), rng.normal(size=(side, side, 1, 4))
    layer = DepthwiseConv(4, side, stride)
    layer.kernel[...] = jnp.asarray(kernel)
    expected = jax.lax.conv_general_dilated(
        jnp.asarray(x),
        jnp.asarray(kernel),
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=4,
    )
    np.testing.assert_allclose(jax.jit(lambda x: layer(x))(x), expected, atol=1e-5)


def test_tensorflow_1_resizes_from_the_corner():
    x_bhwc = jnp.array([[0.0, 1.0], [10.0, 11.0]])[None, :, :, None]
    expected = [[0, 0.5, 1, 1], [5, 5.5, 6, 6], [10, 10.5, 11, 11], [10, 10.5, 11, 11]]
    np.testing.assert_allclose(tf1_bilinear(x_bhwc, 4)[0, :, :, 0], expected)


def test_pillow_resizes_the_center_square():
    image = np.zeros((20, 60, 3), np.uint8)
    image[:, 20:40] = 100
    assert (pillow_bicubic(image, 10) == 100).all()
    assert pillow_bicubic(image[:, :20], 20).base is not None  # of the right size: not copied
