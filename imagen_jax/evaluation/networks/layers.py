"""A convolution with a frozen batch norm, the layer of the older networks."""

from __future__ import annotations

from collections.abc import Callable

import jax
from flax import nnx

EPSILON = 1e-3  # of the batch norms of both networks


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
        groups: int = 1,
        activation: Callable[[jax.Array], jax.Array] = jax.nn.relu,
        rngs: nnx.Rngs,
    ):
        self.conv = nnx.Conv(
            channels,
            width,
            kernel,
            (stride, stride),
            padding=padding,
            feature_group_count=groups,
            use_bias=False,
            rngs=rngs,
        )
        self.bn = nnx.BatchNorm(width, use_running_average=True, epsilon=EPSILON, rngs=rngs)
        self.activation = activation

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        return self.activation(self.bn(self.conv(x_bhwc)))
