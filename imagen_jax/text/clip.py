"""CLIP's text tower up to its penultimate layer: causal, pre-norm, learned positions.

Source: arXiv:2103.00020. Imagen uses the hidden states of the penultimate layer of the frozen text
encoder of ViT-L/14 (arXiv:2205.11487, appendix D.1). The last block, the final norm and the
projection come after that layer, so they are neither built nor read.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from imagen_jax.text.layers import MASKED, FeedForward, SelfAttention, layer_norm


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Shape of a CLIP text tower. Names and defaults follow Hugging Face's config.json.

    Hugging Face may omit a field that has its default value.
    """

    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"

    @property
    def dim(self) -> int:
        return self.hidden_size

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings


PRESETS = {"clip-vit-large-patch14": ClipConfig(768, 12, 12, 3072)}


class Block(nnx.Module):
    """Self-attention, then feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attention_norm = layer_norm(dim, eps, rngs=rngs)
        self.attention = SelfAttention(dim, config.num_attention_heads, rngs=rngs)
        self.mlp_norm = layer_norm(dim, eps, rngs=rngs)
        self.mlp = FeedForward(dim, config.intermediate_size, config.hidden_act, rngs=rngs)

    def __call__(self, x_btd: jax.Array, bias_b1tt: jax.Array) -> jax.Array:
        x_btd = x_btd + self.attention(self.attention_norm(x_btd), bias_b1tt)
        return x_btd + self.mlp(self.mlp_norm(x_btd))


class ClipTextEncoder(nnx.Module):
    """Encoder from token ids to one vector per token.

    int [B, T], bool [B, T] -> float32 [B, T, hidden_size]. `mask_bt` is True at real tokens.
    Attention is causal. T is at most `max_position_embeddings`.
    """

    def __init__(self, config: ClipConfig, *, rngs: nnx.Rngs):
        self.config = config
        dim = config.hidden_size
        self.tokens = nnx.Embed(config.vocab_size, dim, rngs=rngs)
        self.positions = nnx.Embed(config.max_position_embeddings, dim, rngs=rngs)
        num_blocks = config.num_hidden_layers - 1
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(num_blocks)])

    def __call__(self, ids_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        length = ids_bt.shape[1]
        # Weights may be bfloat16. Compute in float32 from the first sum on.
        x_btd = self.tokens(ids_bt).astype(jnp.float32) + self.positions(jnp.arange(length))[None]
        seen_b1tt = jnp.tri(length, dtype=bool)[None, None] & mask_bt[:, None, None, :]
        bias_b1tt = jnp.where(seen_b1tt, 0.0, MASKED)
        for block in self.blocks:
            x_btd = block(x_btd, bias_b1tt)
        return x_btd
