"""Shared by all networks: config keys, inputs and conditioning.

All have the signature `network(z_bhwc, log_snr_b, cond, run_block=..., dropout_key=...)`.

`cond` is a dict of arrays with a leading batch axis:

- text [B, T, text_dim] and text_mask bool [B, T], True for real tokens; not read if pooling and
  sequence are both "none".
- low_res [B, h, w, C] in [-1, 1], already noised, and aug_level [B] in [0, 1], its noise level; not
  read if config.low_res is 0.

`run_block(module, *args)` must return module(*args). The network uses every parameter through it.
Arguments and results are arrays with a leading batch axis, or trees of them, such as cond. The one
exception is the dropout key, always the last argument.
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
MAY_BE_0 = ("low_res", "cond_width", "bottleneck")


def is_positive(value: Any) -> bool:
    """Returns whether `value` is an int above 0; a bool is not an int here."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The config keys all networks share.

    Attributes:
      image_size: height and width of the training images, pixels.
      channels: channels of the images, in and out.
      low_res: height and width of the low-resolution training images, pixels; 0 for a network that
        does no super-resolution.
      low_res_skip: add the enlarged low-resolution image to the output (`add_low_res`), for
        diffusion.prediction="x": the network then learns only what the image lacks, so areas of
        one color stay even.
      cond_width: channels of the time embedding and of the text tokens; 0 means 4 times the
        channels of a U-Net's first level, or the width of a transformer.
      text_dim: width of the text encoder's embeddings.
      text_parts: with several encoders, (tokens, width) of each: the number of tokens it
        contributes, and how many of the text_dim channels it fills.
      pooling: how the text becomes the vector added to the time embedding.
      sequence: how text tokens enter attention: with a LayerNorm, without one, or not at all.
      dropout: rate inside residual blocks; active only if a dropout key is passed.
      dtype: type of the activations; parameters and output are float32.
    """

    image_size: int = 64
    channels: int = 3
    low_res: int = 0
    low_res_skip: bool = False
    cond_width: int = 0
    text_dim: int = 4096
    text_parts: tuple[tuple[int, int], ...] = ()
    pooling: str = "attention"
    sequence: str = "cross_attention_layernorm"
    dropout: float = 0.0
    dtype: str = "bfloat16"

    @property
    def emb_width(self) -> int:
        """Channels of the time embedding and of the text tokens, after defaults."""
        raise NotImplementedError

    @property
    def first_level(self) -> tuple[int, int]:
        """Height (and width) of the largest activations, and their channels."""
        raise NotImplementedError

    @property
    def in_channels(self) -> int:
        """Channels of the input: the noisy image and, if any, the enlarged low-resolution image."""
        return self.channels * (2 if self.low_res else 1)

    def __post_init__(self):
        """Raises UserError for a value out of range or for inconsistent values."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type in (int, "int") and field.name in MAY_BE_0:
                ok = is_positive(value) or (value == 0 and value is not False)
                self._check(field.name, ok, "0 or a positive integer")
            elif field.type in (int, "int"):
                self._check(field.name, is_positive(value), "a positive integer")
            if field.type in (bool, "bool"):
                self._check(field.name, isinstance(value, bool), "True | False")
        for key, allowed in (("pooling", POOLING), ("sequence", SEQUENCE), ("dtype", DTYPE)):
            self._check(key, getattr(self, key) in allowed, " | ".join(allowed))
        ok = isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1
        self._check("dropout", ok, "a number in [0, 1)")
        fits = self.low_res == 0 or self.image_size % self.low_res == 0
        self._check("low_res", fits, f"0 or a divisor of image_size, {self.image_size}")
        fits = "True only with low_res above 0"
        self._check("low_res_skip", not self.low_res_skip or self.low_res > 0, fits)

    def _check(self, key: str, ok: bool, allowed: str):
        if not ok:
            raise UserError(f"config.model.{key} is {getattr(self, key)!r}; allowed: {allowed}")


def with_low_res(
    z_bhwc: jax.Array, cond: Mapping[str, jax.Array], config: NetworkConfig
) -> jax.Array:
    """Concatenates the low-resolution image to z along the channels; without low_res returns z.

    The image is enlarged bilinearly to the size of z, [B, h, w, C] -> [B, H, W, C].
    """
    if not config.low_res:
        return z_bhwc
    return jnp.concatenate([z_bhwc, _enlarged(z_bhwc, cond, config)], axis=-1)


def add_low_res(
    out_bhwc: jax.Array, cond: Mapping[str, jax.Array], config: NetworkConfig
) -> jax.Array:
    """Adds the enlarged low-resolution image to a network's output, as config.low_res_skip asks.

    The image holds noise of aug_level a: alpha x + sigma eps with alpha = cos(pi a / 2) and sigma =
    sin(pi a / 2). It is scaled by alpha s^2 / (alpha^2 s^2 + sigma^2), s = 0.5, which makes it the
    linear estimate of x with the least error if pixels have standard deviation s, as EDM assumes
    (arXiv:2206.00364). At level 0 it is x, at level 1 it is 0.
    """
    angle_b111 = cond["aug_level"].astype(jnp.float32)[:, None, None, None] * (jnp.pi / 2)
    alpha, sigma = jnp.cos(angle_b111), jnp.sin(angle_b111)
    scale = alpha / (alpha**2 + 4 * sigma**2)
    return out_bhwc + scale * _enlarged(out_bhwc, cond, config)


def _enlarged(x_bhwc: jax.Array, cond: Mapping[str, jax.Array], config: NetworkConfig) -> jax.Array:
    shape = (*x_bhwc.shape[:3], config.channels)
    return jax.image.resize(cond["low_res"].astype(x_bhwc.dtype), shape, "bilinear")


class Conditioner(nnx.Module):
    """Map from log-SNR [B] and cond to Conditioning of width emb_width; projects the text once.

    Args:
      time_dim: number of sinusoids in the time embedding.
      head_dim: width of a head in attention pooling.
    """

    def __init__(self, config: NetworkConfig, time_dim: int, head_dim: int, *, rngs: nnx.Rngs):
        width, kw = config.emb_width, {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.time = ScalarEmbedding(time_dim, width, **kw)
        self.aug = ScalarEmbedding(time_dim, width, **kw) if config.low_res else None
        reads_text = config.pooling != "none" or config.sequence != "none"
        # No bias: the null prompt stays zero until a LayerNorm, whose bias makes it trainable.
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
        """Projects the text to the network's width, with one projection per encoder."""
        if not self.text_parts:
            return self.text(text_btd)
        ends = np.cumsum([tokens for tokens, _ in self.text_parts])
        parts = zip(self.text, jnp.split(text_btd, ends[:-1], axis=1), self.text_parts, strict=True)
        return jnp.concatenate([linear(x[:, :, :dim]) for linear, x, (_, dim) in parts], axis=1)


def call_block(block: nnx.Module, *args: Any) -> Any:
    """Calls the block: the default `run_block`."""
    return block(*args)
