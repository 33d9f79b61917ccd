"""The T5 encoder: relative positions, RMS norm, no biases.

Imagen conditions on the output of this encoder, frozen (arXiv:2205.11487, section 2.1). Variants:
- v1.0 (arXiv:1910.10683). It also ties the output layer to the token embedding, but that affects
  only the decoder.
- v1.1: gated feed-forward (arXiv:2002.05202). LM-adapted T5 and Flan-T5 are v1.1 models trained
  further.
- ByT5 (arXiv:2105.13626): v1.1 on bytes.
- mT5 (arXiv:2010.11934): v1.1 in many languages.
- umT5 (arXiv:2304.09151): like mT5, with separate position biases in every block.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagen_jax.text.layers import MASKED


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Shape of a T5 encoder. Field names follow Hugging Face's config.json, except the last.

    `bias_in_every_block` gives each block its own table of position biases, as in umT5. By default
    all blocks share one table.
    """

    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    bias_in_every_block: bool = False

    @property
    def dim(self) -> int:
        return self.d_model

    @property
    def max_positions(self) -> int | None:
        return None  # positions are relative


# The LM-adapted and Flan checkpoints have the shapes of "t5-v1_1-*".
PRESETS = {
    "byte-tiny": T5Config(128, 32, 256, num_layers=6, num_heads=4, vocab_size=384),
    "t5-small": T5Config(512, 64, 2048, num_layers=6, num_heads=8, feed_forward_proj="relu"),
    "t5-base": T5Config(768, 64, 3072, num_layers=12, num_heads=12, feed_forward_proj="relu"),
    "t5-large": T5Config(1024, 64, 4096, num_layers=24, num_heads=16, feed_forward_proj="relu"),
    "t5-3b": T5Config(1024, 128, 16384, num_layers=24, num_heads=32, feed_forward_proj="relu"),
    "t5-11b": T5Config(1024, 128, 65536, num_layers=24, num_heads=128, feed_forward_proj="relu"),
    "t5-v1_1-small": T5Config(512, 64, 1024, num_layers=8, num_heads=6),
    "t5-v1_1-base": T5Config(768, 64, 2048, num_layers=12, num_heads=12),
    "t5-v1_1-large": T5Config(1024, 64, 2816, num_layers=24, num_heads=16),
    "t5-v1_1-xl": T5Config(2048, 64, 5120, num_layers=24, num_heads=32),
    "t5-v1_1-xxl": T5Config(4096, 64, 10240, num_layers=24, num_heads=64),
    "byt5-small": T5Config(1472, 64, 3584, num_layers=12, num_heads=6, vocab_size=384),
    "byt5-base": T5Config(1536, 64, 3968, num_layers=18, num_heads=12, vocab_size=384),
    "byt5-large": T5Config(1536, 64, 3840, num_layers=36, num_heads=16, vocab_size=384),
    "byt5-xl": T5Config(2560, 64, 6720, num_layers=36, num_heads=32, vocab_size=384),
    "byt5-xxl": T5Config(4672, 64, 12352, num_layers=36, num_heads=64, vocab_size=384),
}
for _size in ("small", "base", "large", "xl", "xxl"):
    _v1_1 = PRESETS[f"t5-v1_1-{_size}"]
    PRESETS[f"mt5-{_size}"] = dataclasses.replace(_v1_1, vocab_size=250112)
    PRESETS[f"umt5-{_size}"] = dataclasses.replace(
        _v1_1, vocab_size=256384, bias_in_every_block=True
    )


def relative_position_bucket(
    offset: np.ndarray, *, num_buckets: int, max_distance: int, bidirectional: bool
) -> np.ndarray:
    """Maps offsets to buckets: exact for short distances, logarithmic up to `max_distance`.

    Runs on the host, because a device's approximate log would move distances across bucket borders.

    Args:
      offset: key position minus query position; int, any shape.
      bidirectional: True uses half of the buckets for keys after the query (encoder); False uses
        all buckets for keys before it (decoder).

    Returns:
      Buckets in [0, num_buckets), with the shape of `offset`.
    """
    bucket = np.zeros_like(offset)
    if bidirectional:
        num_buckets //= 2
        bucket = np.where(offset > 0, num_buckets, 0)
        distance = np.abs(offset)
    else:
        distance = np.maximum(-offset, 0)
    exact = num_buckets // 2
    log_ratio = np.log(np.maximum(distance, 1) / exact) / math.log(max_distance / exact)
    # The 1e-6 keeps a distance exactly on a border from rounding into the bucket below.
    far = exact + np.floor(log_ratio * (num_buckets - exact) + 1e-6).astype(offset.dtype)
    return bucket + np.where(distance < exact, distance, np.minimum(far, num_buckets - 1))


class RMSNorm(nnx.Module):
    """RMS norm with a scale, computed in float32. Subtracts no mean and adds no bias."""

    def __init__(self, config: T5Config):
        self.scale = nnx.Param(jnp.ones(config.d_model))
        self.epsilon = config.layer_norm_epsilon

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        x_btd = x_btd.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_btd), axis=-1, keepdims=True)
        return x_btd * jax.lax.rsqrt(mean_square + self.epsilon) * self.scale[None, None, :]


class Linear(nnx.Linear):
    """A bias-free projection of the last axis, with T5's normal initialization."""

    def __init__(self, d_in: int, d_out: int, stddev: float, *, rngs: nnx.Rngs):
        init = nnx.initializers.normal(stddev)
        super().__init__(d_in, d_out, use_bias=False, kernel_init=init, rngs=rngs)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        # Flatten to one matrix: on CPUs the gradient of a 3D product takes twice as long.
        y_nd = super().__call__(x_btd.reshape(-1, self.in_features))
        return y_nd.reshape(*x_btd.shape[:-1], self.out_features)


class Attention(nnx.Module):
    """Multi-head attention without 1/sqrt(d) scaling, which T5 folds into the initialization."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.query = Linear(
            config.d_model, inner, (config.d_model * config.d_kv) ** -0.5, rngs=rngs
        )
        self.key = Linear(config.d_model, inner, config.d_model**-0.5, rngs=rngs)
        self.value = Linear(config.d_model, inner, config.d_model**-0.5, rngs=rngs)
        self.out = Linear(inner, config.d_model, inner**-0.5, rngs=rngs)

    def __call__(self, x_btd: jax.Array, memory_bsd: jax.Array, bias_bhts: jax.Array) -> jax.Array:
        """Attends from `x_btd` to `memory_bsd`. `bias_bhts` is position biases plus mask."""

        def heads(y):
            return y.reshape(*y.shape[:2], self.num_heads, -1)

        q_bthk, k_bshk = heads(self.query(x_btd)), heads(self.key(memory_bsd))
        v_bshk = heads(self.value(memory_bsd))
        logits_bhts = jnp.einsum("bthk,bshk->bhts", q_bthk, k_bshk) + bias_bhts
        weights_bhts = jax.nn.softmax(logits_bhts, axis=-1)
        mixed_bthk = jnp.einsum("bhts,bshk->bthk", weights_bhts, v_bshk)
        return self.out(mixed_bthk.reshape(*x_btd.shape[:2], -1))


class RelativeBias(nnx.Module):
    """Learned attention bias for each head and position bucket."""

    def __init__(self, config: T5Config, *, bidirectional: bool, rngs: nnx.Rngs):
        self.table = nnx.Embed(
            config.relative_attention_num_buckets,
            config.num_heads,
            embedding_init=nnx.initializers.normal(config.d_model**-0.5),
            rngs=rngs,
        )
        self.max_distance = config.relative_attention_max_distance
        self.bidirectional = bidirectional

    def __call__(self, length: int) -> jax.Array:
        """Returns the bias for self-attention over `length` tokens: [1, heads, length, length]."""
        position = np.arange(length)
        bucket_ts = relative_position_bucket(
            position[None, :] - position[:, None],
            num_buckets=self.table.num_embeddings,
            max_distance=self.max_distance,
            bidirectional=self.bidirectional,
        )
        return jnp.transpose(self.table(bucket_ts), (2, 0, 1))[None]


class GatedGelu(nnx.Module):
    """Feed-forward of v1.1: (gelu(x W_gate) * (x W_up)) W_down, with the tanh form of GELU."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.gate = Linear(config.d_model, config.d_ff, config.d_model**-0.5, rngs=rngs)
        self.up = Linear(config.d_model, config.d_ff, config.d_model**-0.5, rngs=rngs)
        self.down = Linear(config.d_ff, config.d_model, config.d_ff**-0.5, rngs=rngs)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        return self.down(jax.nn.gelu(self.gate(x_btd), approximate=True) * self.up(x_btd))


class Relu(nnx.Module):
    """Feed-forward of v1.0: relu(x W_hidden) W_down."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.hidden = Linear(config.d_model, config.d_ff, config.d_model**-0.5, rngs=rngs)
        self.down = Linear(config.d_ff, config.d_model, config.d_ff**-0.5, rngs=rngs)

    def __call__(self, x_btd: jax.Array) -> jax.Array:
        return self.down(jax.nn.relu(self.hidden(x_btd)))


FEED_FORWARDS = {"gated-gelu": GatedGelu, "relu": Relu}


class EncoderBlock(nnx.Module):
    """Self-attention, then feed-forward, each with a norm before it and a residual around it."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = FEED_FORWARDS[config.feed_forward_proj](config, rngs=rngs)
        if config.bias_in_every_block:
            self.relative_bias = RelativeBias(config, bidirectional=True, rngs=rngs)

    def __call__(self, x_btd: jax.Array, bias_bhtt: jax.Array) -> jax.Array:
        y_btd = self.attention_norm(x_btd)
        x_btd = x_btd + self.attention(y_btd, y_btd, bias_bhtt)
        return x_btd + self.mlp(self.mlp_norm(x_btd))


class T5Encoder(nnx.Module):
    """Encoder from token ids to one vector per token.

    int [B, T], bool [B, T] -> float32 [B, T, d_model]. `mask_bt` is True at real tokens. Outputs
    at padding are meaningless, and outputs at real tokens do not depend on padding.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        init = nnx.initializers.normal(1.0)
        self.embed = nnx.Embed(config.vocab_size, config.d_model, embedding_init=init, rngs=rngs)
        if not config.bias_in_every_block:
            self.relative_bias = RelativeBias(config, bidirectional=True, rngs=rngs)
        self.blocks = nnx.List([EncoderBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config)

    def __call__(self, ids_bt: jax.Array, mask_bt: jax.Array) -> jax.Array:
        x_btd = self.embed(ids_bt).astype(jnp.float32)  # weights may be bfloat16
        mask_b11t = jnp.where(mask_bt, 0.0, MASKED)[:, None, None, :]
        for block, bias_1htt in zip(self.blocks, self._biases(ids_bt.shape[1]), strict=False):
            x_btd = block(x_btd, bias_1htt + mask_b11t)
        return self.final_norm(x_btd)

    def _biases(self, length: int) -> Iterable[jax.Array]:
        """Yields the position bias of each block: [1, heads, length, length]."""
        if self.config.bias_in_every_block:
            return (block.relative_bias(length) for block in self.blocks)
        return itertools.repeat(self.relative_bias(length))
