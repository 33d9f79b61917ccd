"""The vision transformer of DINOv2 (arXiv:2304.07193), with Hugging Face's weights and names."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagen_jax.evaluation.networks.weights import LEAVES, Opened
from imagen_jax.text.families import namer
from imagen_jax.text.layers import FeedForward, SelfAttention, layer_norm

EPSILON = 1e-6


@dataclasses.dataclass(frozen=True)
class DinoConfig:
    """Shape of a DINOv2 transformer.

    Attributes:
      grid: side of the stored table of positions, patches.
      offset: added to the target's side before the scale of the table's interpolation is computed.
        Meta's code, which published FD-DINOv2 figures use, adds 0.1; transformers adds 0.
    """

    dim: int
    num_layers: int
    num_heads: int
    patch_size: int = 14
    grid: int = 37
    offset: float = 0.1


LARGE = DinoConfig(1024, 24, 16)
_LEAVES = {
    **LEAVES,
    "cls": "cls_token",
    "positions": "position_embeddings",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}
_NAMES = {
    "": "embeddings",
    "patches": "embeddings.patch_embeddings.projection",
    "blocks.*": "encoder.layer.*",
    "blocks.*.norm1": "encoder.layer.*.norm1",
    "blocks.*.attention.query": "encoder.layer.*.attention.attention.query",
    "blocks.*.attention.key": "encoder.layer.*.attention.attention.key",
    "blocks.*.attention.value": "encoder.layer.*.attention.attention.value",
    "blocks.*.attention.out": "encoder.layer.*.attention.output.dense",
    "blocks.*.norm2": "encoder.layer.*.norm2",
    "blocks.*.mlp.up": "encoder.layer.*.mlp.fc1",
    "blocks.*.mlp.down": "encoder.layer.*.mlp.fc2",
    "norm_out": "layernorm",
}


class Block(nnx.Module):
    """Attention, then feed-forward, each normalized before and scaled per channel after."""

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        dim = config.dim
        self.norm1 = layer_norm(dim, EPSILON, rngs=rngs)
        self.attention = SelfAttention(dim, config.num_heads, rngs=rngs)
        self.scale1 = nnx.Param(jnp.ones(dim))
        self.norm2 = layer_norm(dim, EPSILON, rngs=rngs)
        self.mlp = FeedForward(dim, 4 * dim, "gelu", rngs=rngs)
        self.scale2 = nnx.Param(jnp.ones(dim))

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        no_bias = jnp.zeros((1, 1, 1, 1))  # every token sees every other
        attended = self.attention(self.norm1(x_btd), no_bias)
        x_btd = x_btd + attended * self.scale1[...][None, None]
        return x_btd + self.mlp(self.norm2(x_btd)) * self.scale2[...][None, None]


class Dino(nnx.Module):
    """Normalized images float32 [B, S, S, 3] -> the class token, float32 [B, dim].

    S is a multiple of the patch size.
    """

    def __init__(self, config: DinoConfig, *, rngs: nnx.Rngs):
        self.config, side = config, config.patch_size
        self.patches = nnx.Conv(
            3, config.dim, (side, side), (side, side), padding="VALID", rngs=rngs
        )
        self.cls = nnx.Param(jnp.zeros((1, 1, config.dim)))
        self.positions = nnx.Param(jnp.zeros((1, config.grid**2 + 1, config.dim)))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm_out = layer_norm(config.dim, EPSILON, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h_bhwc = self.patches(x_bhwc)
        size, dim = h_bhwc.shape[1], h_bhwc.shape[-1]
        first_11d, table_1pd = self.positions[...][:, :1], self.positions[...][:, 1:]
        grid = self.config.grid
        if size != grid:
            resize = jnp.asarray(bicubic(grid, size, self.config.offset))
            table_hwd = table_1pd.reshape(grid, grid, dim)
            table_1pd = jnp.einsum("yh,xw,hwd->yxd", resize, resize, table_hwd)
        h_btd = h_bhwc.reshape(len(h_bhwc), -1, dim) + table_1pd.reshape(1, -1, dim)
        first_b1d = jnp.broadcast_to(self.cls[...] + first_11d, (len(h_btd), 1, dim))
        h_btd = jnp.concatenate([first_b1d, h_btd], axis=1)
        for block in self.blocks:
            h_btd = block(h_btd)
        return self.norm_out(h_btd[:, 0])


def bicubic(old: int, new: int, offset: float) -> np.ndarray:
    """Returns the matrix float32 [new, old] of PyTorch's bicubic resize without antialiasing.

    The kernel is Keys's with a = -0.75; the border is repeated.
    """
    scale = old / (new + offset)
    where = (np.arange(new) + 0.5) * scale - 0.5
    left = np.floor(where).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        distance = np.abs(where - left - tap)
        near = (1.25 * distance - 2.25) * distance**2 + 1
        far = -0.75 * (((distance - 5) * distance + 8) * distance - 4)
        index = np.clip(left + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), index), np.where(distance <= 1, near, far))
    return matrix.astype(np.float32)


def open_dino(path: Path, config: DinoConfig = LARGE) -> Opened:
    """Opens a DINOv2 file of Hugging Face."""
    return Opened(path, partial(Dino, config), namer(_NAMES, _LEAVES))
