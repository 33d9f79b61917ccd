"""CLIP's two towers, each up to the embedding that the other tower's is compared with.

Source: arXiv:2103.00020, with the weights and names of Hugging Face's copies.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

from imagen_jax.evaluation.networks.weights import LEAVES, Opened
from imagen_jax.text.clip import Block, ClipConfig, ClipTextEncoder
from imagen_jax.text.families import CLIP_NAMES, namer
from imagen_jax.text.layers import layer_norm


@dataclasses.dataclass(frozen=True)
class ImageConfig:
    """Shape of the image tower.

    Attributes:
      blocks: shape of its blocks.
      image_size: side of an image, pixels.
      patch_size: side of a patch, pixels.
      dim: length of the embedding.
    """

    blocks: ClipConfig
    image_size: int
    patch_size: int
    dim: int


_LARGE = ClipConfig(1024, 24, 16, 4096)
LARGE_TEXT = ClipConfig(768, 12, 12, 3072)
LARGE_14 = ImageConfig(_LARGE, 224, 14, 768)
LARGE_14_336 = dataclasses.replace(LARGE_14, image_size=336)

_BLOCK_NAMES = {k: v for k, v in CLIP_NAMES.items() if k.startswith("blocks.")}
_IMAGE_NAMES = {
    "": "vision_model.embeddings",
    "patches": "vision_model.embeddings.patch_embedding",
    "positions": "vision_model.embeddings.position_embedding",
    "norm_in": "vision_model.pre_layrnorm",
    "norm_out": "vision_model.post_layernorm",
    "projection": "visual_projection",
    **{k: f"vision_model.{v}" for k, v in _BLOCK_NAMES.items()},
}
_TEXT_NAMES = {
    "norm_out": "text_model.final_layer_norm",
    "projection": "text_projection",
    **{f"encoder.{k}": f"text_model.{v}" for k, v in CLIP_NAMES.items()},
}


def _unit(x_bd: jax.Array) -> jax.Array:
    return x_bd / jnp.linalg.norm(x_bd, axis=-1, keepdims=True)


class ImageTower(nnx.Module):
    """Normalized images float32 [B, S, S, 3] -> embeddings of length 1, float32 [B, dim]."""

    def __init__(self, config: ImageConfig, *, rngs: nnx.Rngs):
        c, width, side = config, config.blocks.hidden_size, config.patch_size
        self.patches = nnx.Conv(
            3, width, (side, side), (side, side), padding="VALID", use_bias=False, rngs=rngs
        )
        self.cls = nnx.Param(jnp.zeros(width))
        self.positions = nnx.Embed((c.image_size // side) ** 2 + 1, width, rngs=rngs)
        self.norm_in = layer_norm(width, c.blocks.layer_norm_eps, rngs=rngs)
        blocks = [Block(c.blocks, rngs=rngs) for _ in range(c.blocks.num_hidden_layers)]
        self.blocks = nnx.List(blocks)
        self.norm_out = layer_norm(width, c.blocks.layer_norm_eps, rngs=rngs)
        self.projection = nnx.Linear(width, c.dim, use_bias=False, rngs=rngs)

    def __call__(self, x_bhwc: jax.Array) -> jax.Array:
        h_bhwc = self.patches(x_bhwc)
        h_btd = h_bhwc.reshape(len(h_bhwc), -1, h_bhwc.shape[-1])
        cls_b1d = jnp.broadcast_to(self.cls[...], (len(h_btd), 1, h_btd.shape[-1]))
        h_btd = jnp.concatenate([cls_b1d, h_btd], axis=1)
        h_btd = self.norm_in(h_btd + self.positions.embedding[...][None])
        no_bias = jnp.zeros((1, 1, 1, 1))  # every token sees every other
        for block in self.blocks:
            h_btd = block(h_btd, no_bias)
        return _unit(self.projection(self.norm_out(h_btd[:, 0])))


class TextTower(nnx.Module):
    """Token ids int [B, T] and their mask bool [B, T] -> embeddings of length 1 [B, dim]."""

    def __init__(self, config: ClipConfig, dim: int, *, rngs: nnx.Rngs):
        # The encoder stops before its last block; here, that is one block later.
        deeper = dataclasses.replace(config, num_hidden_layers=config.num_hidden_layers + 1)
        self.encoder = ClipTextEncoder(deeper, rngs=rngs)
        self.norm_out = layer_norm(config.hidden_size, config.layer_norm_eps, rngs=rngs)
        self.projection = nnx.Linear(config.hidden_size, dim, use_bias=False, rngs=rngs)

    def __call__(self, ids_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        h_btd = self.norm_out(self.encoder(ids_bt, mask_bt))
        last_b = mask_bt.sum(1) - 1  # the end token
        return _unit(self.projection(h_btd[jnp.arange(len(h_btd)), last_b]))


def open_image_tower(path: Path, config: ImageConfig) -> Opened:
    """Opens the image tower of a CLIP file of Hugging Face."""
    leaves = {**LEAVES, "cls": "class_embedding"}
    return Opened(path, partial(ImageTower, config), namer(_IMAGE_NAMES, leaves))


def open_text_tower(path: Path, config: ClipConfig = LARGE_TEXT, dim: int = 768) -> Opened:
    """Opens the text tower of a CLIP file of Hugging Face."""
    return Opened(path, partial(TextTower, config, dim), namer(_TEXT_NAMES, LEAVES))
