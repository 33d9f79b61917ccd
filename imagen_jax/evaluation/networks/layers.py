"""Convolutions with a frozen batch norm, the layers of the older networks."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

EPSILON = 1e-3  # of the batch norms of both networks


class DepthwiseConv(nnx.Module):
    """Convolves each channel alone, with TensorFlow's "SAME" padding and no bias.

    A sum of shifted products, which XLA fuses; on a CPU, its grouped convolution takes 3 to 18
    times as long.
    """

    def __init__(self, channels: int, side: int, stride: int):
        self.kernel = nnx.Param(jnp.zeros((side, side, 1, channels)))
        self.stride = stride

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        kernel, side, stride = self.kernel[...], len(self.kernel[...]), self.stride
        spans, padding = [], [(0, 0)]
        for old in x_bhwc.shape[1:3]:
            span = (-(-old // stride) - 1) * stride + 1  # from the first to the last window
            missing = max(span + side - 1 - old, 0)
            spans.append(span)
            padding.append((missing // 2, missing - missing // 2))
        x_bhwc = jnp.pad(x_bhwc, [*padding, (0, 0)])
        total = 0.0
        for i, j in itertools.product(range(side), repeat=2):
            shifted = x_bhwc[:, i : i + spans[0] : stride, j : j + spans[1] : stride]
            total = total + shifted * kernel[i : i + 1, j : j + 1]
        return total


class ConvNorm(nnx.Module):
    """Convolution without bias, batch norm with stored statistics, activation.

    "SAME" padding is TensorFlow's: with stride 2, the extra row is at the bottom.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        *,
        padding: str = "SAME",
        depthwise: bool = False,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        rngs: nnx.Rngs,
    ):
        if depthwise:
            self.conv = DepthwiseConv(width, kernel[0], stride)
        else:
            strides = (stride, stride)
            self.conv = nnx.Conv(
                channels, width, kernel, strides, padding=padding, use_bias=False, rngs=rngs
            )
        self.bn = nnx.BatchNorm(width, use_running_average=True, epsilon=EPSILON, rngs=rngs)
        self.activation = activation

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return self.activation(self.bn(self.conv(x_bhwc)))
