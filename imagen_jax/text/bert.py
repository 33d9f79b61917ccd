"""The BERT encoder: learned positions, post-norm blocks, output of the last block.

Source: arXiv:1810.04805. Imagen compares frozen BERT base and large as text encoders
(arXiv:2205.11487, appendix D.1).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from imagen_jax.text.layers import MASKED, FeedForward, SelfAttention, layer_norm


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Shape of a BERT encoder. Field names follow Hugging Face's config.json."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    position_embedding_type: str = "absolute"

    @property
    def dim(self) -> int:
        return self.hidden_size

    @property
    def max_positions(self) -> int:
        return self.max_position_embeddings


PRESETS = {
    "bert-base": BertConfig(768, 12, 12, 3072),
    "bert-large": BertConfig(1024, 24, 16, 4096),
}


class Embeddings(nnx.Module):
    """Sum of token, position and segment embeddings, normalized. All text is segment 0."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        dim = config.hidden_size
        self.tokens = nnx.Embed(config.vocab_size, dim, rngs=rngs)
        self.positions = nnx.Embed(config.max_position_embeddings, dim, rngs=rngs)
        self.segments = nnx.Embed(config.type_vocab_size, dim, rngs=rngs)
        self.norm = layer_norm(dim, config.layer_norm_eps, rngs=rngs)

    def __call__(self, ids_bt: jax.Array) -> jax.Array:
        position_1td = self.positions(jnp.arange(ids_bt.shape[1]))[None]
        # Weights may be bfloat16. Compute in float32 from the first sum on.
        token_btd = self.tokens(ids_bt).astype(jnp.float32)
        return self.norm(token_btd + position_1td + self.segments(jnp.zeros_like(ids_bt)))


class Block(nnx.Module):
    """Self-attention, then feed-forward, each with a residual and a norm after the sum."""

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.attention = SelfAttention(dim, config.num_attention_heads, rngs=rngs)
        self.attention_norm = layer_norm(dim, eps, rngs=rngs)
        self.mlp = FeedForward(dim, config.intermediate_size, config.hidden_act, rngs=rngs)
        self.mlp_norm = layer_norm(dim, eps, rngs=rngs)

    def __call__(self, x_btd: jax.Array, bias_b11t: jax.Array) -> jax.Array:
        x_btd = self.attention_norm(x_btd + self.attention(x_btd, bias_b11t))
        return self.mlp_norm(x_btd + self.mlp(x_btd))


class BertEncoder(nnx.Module):
    """Encoder from token ids to one vector per token.

    int [B, T], bool [B, T] -> float32 [B, T, hidden_size]. `mask_bt` is True at real tokens.
    Outputs at padding are meaningless, and outputs at real tokens do not depend on padding. T is at
    most `max_position_embeddings`.
    """

    def __init__(self, config: BertConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = Embeddings(config, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.num_hidden_layers)])

    def __call__(self, ids_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        x_btd = self.embed(ids_bt)
        bias_b11t = jnp.where(mask_bt, 0.0, MASKED)[:, None, None, :]
        for block in self.blocks:
            x_btd = block(x_btd, bias_b11t)
        return x_btd
