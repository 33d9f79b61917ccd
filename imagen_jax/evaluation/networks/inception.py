"""The Inception v3 of FID: TensorFlow's graph of 2015-12-05, as PyTorch ports store it.

It differs from torchvision's Inception v3 in three ways: average pooling ignores the padding, the
last block pools by maximum, and there are 1008 classes. Source: arXiv:1512.00567, with weights that
pytorch-fid and torch-fidelity share.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagen_jax.evaluation.networks.layers import ConvNorm
from imagen_jax.evaluation.networks.weights import LEAVES, Key, Opened
from imagen_jax.formats.torch import read_torch

DIM = 2048


class Conv(NamedTuple):
    """A convolution of a block. Its name is the file's."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1


# A chain of convolutions. A list in it is a fork, whose outputs are concatenated.
Chain = tuple[Conv | list[Conv], ...]
ROW, COLUMN = (1, 7), (7, 1)


def _block_a(pooled: int) -> tuple[tuple[Chain, ...], str, int]:
    chains = (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3)),
        ),
    )
    return chains, "mean", pooled


def _block_c(width: int) -> tuple[tuple[Chain, ...], str, int]:
    chains = (
        (Conv("branch1x1", 192),),
        (
            Conv("branch7x7_1", width),
            Conv("branch7x7_2", width, ROW),
            Conv("branch7x7_3", 192, COLUMN),
        ),
        (
            Conv("branch7x7dbl_1", width),
            Conv("branch7x7dbl_2", width, COLUMN),
            Conv("branch7x7dbl_3", width, ROW),
            Conv("branch7x7dbl_4", width, COLUMN),
            Conv("branch7x7dbl_5", 192, ROW),
        ),
    )
    return chains, "mean", 192


def _block_e(pool: str) -> tuple[tuple[Chain, ...], str, int]:
    chains = (
        (Conv("branch1x1", 320),),
        (
            Conv("branch3x3_1", 384),
            [Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1))],
        ),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            [Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))],
        ),
    )
    return chains, pool, 192


_BLOCK_B = (
    (
        (Conv("branch3x3", 384, (3, 3), 2),),
        (
            Conv("branch3x3dbl_1", 64),
            Conv("branch3x3dbl_2", 96, (3, 3)),
            Conv("branch3x3dbl_3", 96, (3, 3), 2),
        ),
    ),
    "halve",
    0,
)
_BLOCK_D = (
    (
        (Conv("branch3x3_1", 192), Conv("branch3x3_2", 320, (3, 3), 2)),
        (
            Conv("branch7x7x3_1", 192),
            Conv("branch7x7x3_2", 192, ROW),
            Conv("branch7x7x3_3", 192, COLUMN),
            Conv("branch7x7x3_4", 192, (3, 3), 2),
        ),
    ),
    "halve",
    0,
)
# name -> chains, pooling, channels of the convolution after pooling (0: none).
BLOCKS = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": _BLOCK_B,
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": _BLOCK_D,
    "Mixed_7b": _block_e("mean"),
    "Mixed_7c": _block_e("max"),
}
_halve = partial(nnx.max_pool, window_shape=(3, 3), strides=(2, 2))
POOLS = {
    "mean": partial(
        nnx.avg_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME", count_include_pad=False
    ),
    "max": partial(nnx.max_pool, window_shape=(3, 3), strides=(1, 1), padding="SAME"),
    "halve": _halve,
}


class Mixed(nnx.Module):
    """Chains of convolutions and a pooling, side by side; their outputs are concatenated."""

    def __init__(
        self, channels: int, chains: tuple[Chain, ...], pool: str, pooled: int, *, rngs: nnx.Rngs
    ):
        self.pool, self.out_channels, names = pool, pooled or channels, []
        for chain in chains:
            width, steps = channels, []
            for step in chain:
                fork = step if isinstance(step, list) else [step]
                for conv in fork:
                    padding = "SAME" if conv.stride == 1 else "VALID"
                    layer = ConvNorm(width, *conv[1:], padding=padding, rngs=rngs)
                    setattr(self, conv.name, layer)
                width = sum(conv.width for conv in fork)
                steps.append(tuple(conv.name for conv in fork))
            self.out_channels += width
            names.append(tuple(steps))
        self.chains = tuple(names)
        if pooled:
            self.branch_pool = ConvNorm(channels, pooled, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        outputs = []
        for chain in self.chains:
            h = x_bhwc
            for fork in chain:
                h = jnp.concatenate([getattr(self, name)(h) for name in fork], axis=-1)
            outputs.append(h)
        pooled = POOLS[self.pool](x_bhwc)
        outputs.append(pooled if self.pool == "halve" else self.branch_pool(pooled))
        return jnp.concatenate(outputs, axis=-1)


class Inception(nnx.Module):
    """float32 [B, 299, 299, 3] in [-1, 1] -> float32 [B, 2048], the pooled features."""

    def __init__(self, *, rngs: nnx.Rngs):
        valid = {"padding": "VALID", "rngs": rngs}
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, (3, 3), 2, **valid)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, (3, 3), **valid)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, (3, 3), rngs=rngs)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, rngs=rngs)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, (3, 3), **valid)
        channels = 192
        for name, (chains, pool, pooled) in BLOCKS.items():
            block = Mixed(channels, chains, pool, pooled, rngs=rngs)
            setattr(self, name, block)
            channels = block.out_channels

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h = self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x_bhwc))
        h = _halve(self.Conv2d_2b_3x3(h))
        h = _halve(self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(h)))
        for name in BLOCKS:
            h = getattr(self, name)(h)
        return h.mean((1, 2))


def _stored_name(key: Key) -> str:
    *module, leaf = (str(part) for part in key)
    return f"{'.'.join(module)}.{LEAVES[leaf]}"


def open_inception(path: Path) -> Opened:
    """Opens the weights that pytorch-fid and torch-fidelity share."""
    return Opened(path, Inception, _stored_name)


def read_classifier(path: Path) -> np.ndarray:
    """Returns the classifier, float32 [2048, 1008], for the Inception score.

    The score leaves the classifier's bias out, as the original does.
    """
    return read_torch(path)["fc.weight"].T.read((slice(None),) * 2).astype(np.float32)
