"""What both U-Nets have around their blocks: shared config keys, and what goes in.

Both are called as `network(z_bhwc, log_snr_b, cond, run_block=..., dropout_key=...)`.

`cond` is a dict of arrays whose first axis is the batch:
- text [B, T, text_dim] and text_mask bool [B, T], True for real tokens; not read when pooling and
  sequence are "none".
- low_res [B, h, w, C] in [-1, 1], noised already, and aug_level [B] in [0, 1], which says how much;
  not read when config.low_res is 0.

`run_block(module, *args)` must return module(*args): every parameter is used through it, and args
and results are arrays (or None, or cond, or Conditioning) whose first axis is the batch, except the
dropout key, always last.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagen_jax.common.errors import UserError
from imagen_jax.models.layers import Conditioning, ScalarEmbedding, TextPooling, cosine_time

POOLING = ("attention", "mean", "none")
SEQUENCE = ("cross_attention_layernorm", "cross_attention", "none")
DTYPE = ("bfloat16", "float32")
MAY_BE_0 = ("low_res", "cond_width")


def is_positive(value: Any) -> bool:
    """Whether it is an int above 0; a bool is not."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The config keys that both U-Nets have.

    Attributes:
      image_size: height and width of the images it is trained on, pixels.
      channels: of the images, in and out.
      low_res: height and width of the low-resolution images it is trained to enlarge, pixels; 0 for
        a network that enlarges none.
      cond_width: channels of the time embedding and of the text tokens; 0 is 4 times the first
        level's.
      text_dim: width of the text encoder's embeddings.
      text_parts: of several encoders, (tokens, width) of each: so many tokens of the text are its,
        and so many of their text_dim numbers.
      pooling: how the text becomes one vector, added to the time embedding.
      sequence: how the text tokens enter attention, with LayerNorm, without, or not at all.
      dropout: rate inside residual blocks, active only when a dropout key is passed.
      dtype: of activations; parameters and output are float32.
    """

    image_size: int = 64
    channels: int = 3
    low_res: int = 0
    cond_width: int = 0
    text_dim: int = 4096
    text_parts: tuple[tuple[int, int], ...] = ()
    pooling: str = "attention"
    sequence: str = "cross_attention_layernorm"
    dropout: float = 0.0
    dtype: str = "bfloat16"

    @property
    def emb_width(self) -> int:
        """Channels of the time embedding and of the text tokens, whether configured or not."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """Channels of the noisy image and of the enlarged one beside it."""
        return self.channels * (2 if self.low_res else 1)

    def __post_init__(self):
        """Raises UserError for a value out of range, or values that do not fit together."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and field.name in MAY_BE_0:
                ok = is_positive(value) or (value == 0 and value is not False)
                self._check(field.name, ok, "0 or a positive integer")
            elif field.type == "int":
                self._check(field.name, is_positive(value), "a positive integer")
            if field.type == "bool":
                self._check(field.name, isinstance(value, bool), "True | False")
        for key, allowed in (("pooling", POOLING), ("sequence", SEQUENCE), ("dtype", DTYPE)):
            self._check(key, getattr(self, key) in allowed, " | ".join(allowed))
        ok = isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1
        self._check("dropout", ok, "a number in [0, 1)")
        fits = self.low_res == 0 or self.image_size % self.low_res == 0
        self._check("low_res", fits, f"0 or a divisor of image_size, {self.image_size}")

    def _check(self, key: str, ok: bool, allowed: str):
        if not ok:
            raise UserError(f"model.{key} is {getattr(self, key)!r}; it must be {allowed}")


def with_low_res(
    z_bhwc: jax.Array, cond: Mapping[str, jax.Array], config: NetworkConfig
) -> jax.Array:
    """z and, in a super-resolution model, the low-resolution image at its size as more channels.

    It is enlarged bilinearly to whatever size z has, [B, h, w, C] -> [B, H, W, C].
    """
    if not config.low_res:
        return z_bhwc
    shape = (*z_bhwc.shape[:3], config.channels)
    enlarged = jax.image.resize(cond["low_res"].astype(z_bhwc.dtype), shape, "bilinear")
    return jnp.concatenate([z_bhwc, enlarged], axis=-1)


class Conditioner(nnx.Module):
    """log-SNR [B] and cond -> Conditioning, emb_width wide; the text is projected only once.

    time_dim is the width of the sinusoids, head_dim that of a head of the pooling's attention.
    """

    def __init__(self, config: NetworkConfig, time_dim: int, head_dim: int, *, rngs: nnx.Rngs):
        width, kw = config.emb_width, {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.time = ScalarEmbedding(time_dim, width, **kw)
        self.aug = ScalarEmbedding(time_dim, width, **kw) if config.low_res else None
        reads_text = config.pooling != "none" or config.sequence != "none"
        # No bias: the zeros of the null prompt stay zeros until a LayerNorm gives them a value.
        project = partial(nnx.Linear, out_features=width, use_bias=False, **kw)
        pool = partial(TextPooling, config.pooling, width, head_dim, **kw)
        self.text_parts = config.text_parts
        if not reads_text:
            self.text = None
        elif config.text_parts:
            self.text = nnx.List([project(dim) for _, dim in config.text_parts])
        else:
            self.text = project(config.text_dim)
        self.pool = pool() if config.pooling != "none" else None

    def __call__(self, log_snr_b: jax.Array, cond: Mapping[str, jax.Array]) -> Conditioning:
        emb = self.time(cosine_time(log_snr_b))
        if self.aug is not None:
            emb = emb + self.aug(cond["aug_level"])
        if self.text is None:
            return Conditioning(emb, None, None)
        text, mask = self._projected(cond["text"]), cond["text_mask"]
        return Conditioning(emb if self.pool is None else emb + self.pool(text, mask), text, mask)

    def _projected(self, text_btd: jax.Array) -> jax.Array:
        """The text at the network's width, each encoder's tokens by a projection of their own."""
        if not self.text_parts:
            return self.text(text_btd)
        ends = np.cumsum([tokens for tokens, _ in self.text_parts])
        parts = zip(self.text, jnp.split(text_btd, ends[:-1], axis=1), self.text_parts, strict=True)
        return jnp.concatenate([linear(x[:, :, :dim]) for linear, x, (_, dim) in parts], axis=1)


def call_block(block: nnx.Module, *args: Any) -> Any:
    """The plainest `run_block`."""
    return block(*args)
