"""The base U-Net: noisy 64x64 image, log-SNR and text -> raw prediction (arXiv:2205.11487, F.1).

Read top to bottom: the config, the plan of blocks that follows from it, a block, the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imagen_jax.errors import UserError
from imagen_jax.models.layers import (
    Attention,
    Conditioning,
    GroupNorm,
    ResBlock,
    TextPooling,
    TimeEmbedding,
    depth_to_space,
    space_to_depth,
    zeros_init,
)

POOLING = ("attention", "mean", "none")
SEQUENCE = ("cross_attention_layernorm", "cross_attention", "none")
DTYPE = ("bfloat16", "float32")


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The shape of the network; the defaults are the paper's 2B model, 1,988,589,571 parameters.

    Three things that the paper leaves open, what is chosen here, and the sizes of the alternatives:
    - The time embedding and the text tokens are `cond_width` = 4 x embed_dim wide: one projection
      takes the tokens there before any attention (DeepFloyd IF projects first, too). Keys and
      values made straight from the encoder's 4096 would come to 2.14B.
    - A decoder level has as many blocks as its encoder level, each fed the output of one of them.
      ADM has one more, fed the level's input: `decoder_extra_block=True`, 2.26B.
    - The blocks that resample come on top of num_res_blocks and have neither skip nor attention.

    Attributes:
      image_size: height and width of the images, pixels.
      channels: of the images, in and out.
      patch_size: the first level sees the image with squares of this many pixels folded into
        channels (arXiv:2301.11093, section 2.3); 1, the paper's, leaves it as it is.
      embed_dim: channels at the first level; level i has embed_dim * channel_mult[i].
      num_res_blocks: blocks a level, besides the resampling one.
      attention_resolutions: the resolutions whose blocks attend to pixels and text.
      per_head_channels: channels of one attention head.
      text_dim: width of the text encoder's embeddings.
      pooling: how the text becomes one vector, added to the time embedding.
      sequence: how the text tokens enter attention, with LayerNorm, without, or not at all.
      use_scale_shift_norm: the embedding scales and shifts the norm instead of being added.
      dropout: rate inside residual blocks, active only when a dropout key is passed.
      dtype: of activations; parameters and output are float32.
    """

    image_size: int = 64
    channels: int = 3
    patch_size: int = 1
    embed_dim: int = 512
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    per_head_channels: int = 64
    text_dim: int = 4096
    pooling: str = "attention"
    sequence: str = "cross_attention_layernorm"
    use_scale_shift_norm: bool = True
    decoder_extra_block: bool = False
    dropout: float = 0.0
    dtype: str = "bfloat16"

    @property
    def cond_width(self) -> int:
        return 4 * self.embed_dim

    @property
    def resolutions(self) -> tuple[int, ...]:
        finest = self.image_size // self.patch_size
        return tuple(finest >> level for level in range(len(self.channel_mult)))

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.embed_dim * mult for mult in self.channel_mult)

    def __post_init__(self):
        """Raises UserError for a value out of range, or values that do not fit together."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int":
                self._check(field.name, _is_positive(value), "a positive integer")
            if field.type == "bool":
                self._check(field.name, isinstance(value, bool), "True | False")
        self._check("embed_dim", self.embed_dim % 2 == 0, "an even number")
        mult, attending = self.channel_mult, self.attention_resolutions
        ok = isinstance(mult, tuple) and len(mult) > 0 and all(map(_is_positive, mult))
        self._check("channel_mult", ok, "a tuple of positive integers")
        for key, allowed in (("pooling", POOLING), ("sequence", SEQUENCE), ("dtype", DTYPE)):
            self._check(key, getattr(self, key) in allowed, " | ".join(allowed))
        ok = isinstance(self.dropout, (int, float)) and 0 <= self.dropout < 1
        self._check("dropout", ok, "a number in [0, 1)")
        self._check("patch_size", _is_positive(self.patch_size), "a positive integer")
        factor = self.patch_size * 2 ** (len(mult) - 1)
        self._check("image_size", self.image_size % factor == 0, f"a multiple of {factor}")
        known = f"a tuple of resolutions among {self.resolutions}"
        ok = isinstance(attending, tuple) and set(attending) <= set(self.resolutions)
        self._check("attention_resolutions", ok, known)
        for resolution, width in zip(self.resolutions, self.widths, strict=True):
            if resolution in attending:
                fits = f"a divisor of the {width} channels at resolution {resolution}"
                self._check("per_head_channels", width % self.per_head_channels == 0, fits)
        if self.pooling == "attention":
            fits = f"a divisor of the {self.cond_width} channels (4 x embed_dim) of the text"
            self._check("per_head_channels", self.cond_width % self.per_head_channels == 0, fits)

    def _check(self, key: str, ok: bool, allowed: str):
        if not ok:
            raise UserError(f"model.{key} is {getattr(self, key)!r}; it must be {allowed}")


def _is_positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """One block of the U-Net: its channels, and what happens to its input and output.

    Attributes:
      skip_channels: channels of the encoder output joined to the input; 0 is none.
      saves_skip: whether the output is kept for the decoder.
    """

    in_channels: int
    out_channels: int
    skip_channels: int = 0
    resample: str | None = None
    attends: bool = False
    saves_skip: bool = False


def plan_blocks(config: UNetConfig) -> tuple[list[BlockSpec], list[BlockSpec], list[BlockSpec]]:
    """Every block of the encoder, middle and decoder in order, all channels settled."""
    extra = config.decoder_extra_block
    attends = [resolution in config.attention_resolutions for resolution in config.resolutions]
    levels = list(zip(config.widths, attends, strict=True))
    encoder, middle, decoder = [], [], []
    width = config.embed_dim
    skips = [width] if extra else []
    for level, (out, attend) in enumerate(levels):
        if level > 0:
            encoder.append(BlockSpec(width, width, resample="down", saves_skip=extra))
            skips.extend([width] if extra else [])
        for _ in range(config.num_res_blocks):
            encoder.append(BlockSpec(width, out, attends=attend, saves_skip=True))
            skips.append(out)
            width = out
    middle.append(BlockSpec(width, width, attends=attends[-1]))
    middle.append(BlockSpec(width, width))
    for level, (out, attend) in reversed(list(enumerate(levels))):
        for _ in range(config.num_res_blocks + extra):
            decoder.append(BlockSpec(width, out, skip_channels=skips.pop(), attends=attend))
            width = out
        if level > 0:
            decoder.append(BlockSpec(width, width, resample="up"))
    return encoder, middle, decoder


class Block(nnx.Module):
    """A residual block and, where planned, its attention: the unit of rematerialization."""

    def __init__(self, spec: BlockSpec, config: UNetConfig, *, rngs: nnx.Rngs):
        self.res = ResBlock(
            spec.in_channels + spec.skip_channels,
            spec.out_channels,
            config.cond_width,
            resample=spec.resample,
            scale_shift=config.use_scale_shift_norm,
            dropout_rate=config.dropout,
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        attention = partial(
            Attention,
            spec.out_channels,
            config.per_head_channels,
            text_width=0 if config.sequence == "none" else config.cond_width,
            text_norm=config.sequence == "cross_attention_layernorm",
            dtype=jnp.dtype(config.dtype),
            rngs=rngs,
        )
        self.attention = attention() if spec.attends else None

    def __call__(
        self,
        h_bhwc: jax.Array,
        skip_bhwc: jax.Array | None,
        cond: Conditioning,
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        if skip_bhwc is not None:
            h_bhwc = jnp.concatenate([h_bhwc, skip_bhwc], axis=-1)
        h = self.res(h_bhwc, cond.emb, dropout_key)
        return h if self.attention is None else self.attention(h, cond)


class Conditioner(nnx.Module):
    """log-SNR, text [B, T, text_dim] and mask [B, T] -> Conditioning; projects the text once."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        width, kw = config.cond_width, {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.time = TimeEmbedding(config.embed_dim, width, **kw)
        reads_text = config.pooling != "none" or config.sequence != "none"
        # No bias: the zeros of the null prompt stay zeros until a LayerNorm gives them a value.
        project = partial(nnx.Linear, config.text_dim, width, use_bias=False, **kw)
        pool = partial(TextPooling, config.pooling, width, config.per_head_channels, **kw)
        self.text = project() if reads_text else None
        self.pool = pool() if config.pooling != "none" else None

    def __call__(self, log_snr_b: jax.Array, cond: Mapping[str, jax.Array]) -> Conditioning:
        emb = self.time(log_snr_b)
        if self.text is None:
            return Conditioning(emb, None, None)
        text, mask = self.text(cond["text"]), cond["text_mask"]
        return Conditioning(emb if self.pool is None else emb + self.pool(text, mask), text, mask)


class Head(nnx.Module):
    """Norm, swish and a convolution that starts at zero, the last in float32."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(in_channels, dtype=jnp.float32)
        self.conv = nnx.Conv(in_channels, out_channels, (3, 3), kernel_init=zeros_init, rngs=rngs)

    def __call__(self, h_bhwc: jax.Array) -> jax.Array:
        return self.conv(jax.nn.silu(self.norm(h_bhwc)))


def call_block(block: nnx.Module, *args: Any) -> Any:
    return block(*args)


class UNet(nnx.Module):
    """The network. Its state holds nnx.Param only, so that it is a pure function of a dict."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        encoder, middle, decoder = plan_blocks(config)
        specs = [*encoder, *middle, *decoder]
        width, dtype = config.embed_dim, jnp.dtype(config.dtype)
        self.config = config
        self.specs = tuple(specs)
        self.conditioner = Conditioner(config, rngs=rngs)
        pixels = config.channels * config.patch_size**2
        self.stem = nnx.Conv(pixels, width, (3, 3), dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(spec, config, rngs=rngs) for spec in specs])
        self.head = Head(specs[-1].out_channels, pixels, rngs=rngs)

    def __call__(
        self,
        z_bhwc: jax.Array,
        log_snr_b: jax.Array,
        cond: Mapping[str, jax.Array],
        *,
        run_block: Callable[..., Any] = call_block,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Predicts eps, x or v (whatever it is trained for), float32 in the shape of z.

        `cond` holds text [B, T, text_dim] and text_mask bool [B, T], True for real tokens; it is
        not read when pooling and sequence are "none". `run_block(module, *args)` must return
        module(*args): every parameter is used through it, and args and results are arrays (or None,
        or Conditioning) whose first axis is the batch, except the dropout key, always last. Without
        a dropout key nothing is dropped.
        """
        conditioning = run_block(self.conditioner, log_snr_b, cond)
        patch = self.config.patch_size
        h = run_block(self.stem, space_to_depth(z_bhwc, patch))
        skips = [h] if self.config.decoder_extra_block else []
        for i, (spec, block) in enumerate(zip(self.specs, self.blocks, strict=True)):
            skip = skips.pop() if spec.skip_channels else None
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            h = run_block(block, h, skip, conditioning, key)
            if spec.saves_skip:
                skips.append(h)
        return depth_to_space(run_block(self.head, h), patch)
