"""The base U-Net: noisy 64x64 image, log-SNR and text -> raw prediction.

Source: arXiv:2205.11487, appendix F.1. With `low_res` it becomes a super-resolution
model, the baseline for efficient_unet.py.

Reading order: the config, the plan of blocks it implies, a block, the head, the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from imagen_jax.models.denoiser import (
    Conditioner,
    NetworkConfig,
    call_block,
    is_positive,
    with_low_res,
)
from imagen_jax.models.layers import Attention, Conditioning, GroupNorm, ResBlock, zeros_init
from imagen_jax.models.resampling import depth_to_space, space_to_depth

# The layers after the last block. "norm" is the paper's, for eps: norm, swish, convolution. A norm
# erases the color and contrast of an image, so a network that predicts x could not even return a
# clean input. "plain" is the convolution alone.
#
# Squared error of x for x-prediction on 32x32 scenes, patch 4, 150 steps at batch size 8:
#
# | log-SNR             |  -4   |   0   |   2   |   4   |   8   |
# |---------------------|-------|-------|-------|-------|-------|
# | "norm"              | 0.185 | 0.116 | 0.116 | 0.115 | 0.114 |
# | "plain"             | 0.194 | 0.061 | 0.045 | 0.044 | 0.044 |
# | "plain" plus gain z | 0.184 | 0.065 | 0.038 | 0.023 | 0.020 |
#
# The last row adds z with a gain that the network computes from the embedding. Its error is lower,
# but z brings its noise along, and the samples of a short run stay noisy.
HEADS = ("norm", "plain")


@dataclasses.dataclass(frozen=True)
class UNetConfig(NetworkConfig):
    """Hyperparameters; the defaults are the paper's 2B model, 1,988,589,571 parameters.

    The paper leaves three things open. The choices here, with the sizes of the alternatives:
    - The time embedding and the text tokens are 4 x embed_dim wide: one projection brings the
      tokens to this width before any attention, as in DeepFloyd IF. Keys and values computed
      directly from the encoder's 4096 channels would give 2.14B.
    - A decoder level has as many blocks as its encoder level, and each takes the output of one
      encoder block. ADM has one more, which takes the level's input: `decoder_extra_block=True`,
      2.26B.
    - The blocks that resample are in addition to num_res_blocks; they have no skip or attention.

    Attributes, in addition to those of NetworkConfig:
      patch_size: side of the pixel squares folded into channels before the first level
        (arXiv:2301.11093, section 2.3); 1 folds nothing, as in the paper.
      embed_dim: channels at the first level; level i has embed_dim * channel_mult[i].
      num_res_blocks: blocks per level, not counting the one that resamples.
      attention_resolutions: resolutions at which blocks attend to pixels and text.
      per_head_channels: channels of one attention head.
      use_scale_shift_norm: the embedding scales and shifts the norm's output instead of being added
        before it.
      head: the output layers, one of HEADS. It follows from diffusion.prediction.
    """

    patch_size: int = 1
    embed_dim: int = 512
    channel_mult: tuple[int, ...] = (1, 2, 3, 4)
    num_res_blocks: int = 3
    attention_resolutions: tuple[int, ...] = (32, 16, 8)
    per_head_channels: int = 64
    use_scale_shift_norm: bool = True
    decoder_extra_block: bool = False
    head: str = "norm"

    @property
    def emb_width(self) -> int:
        return self.cond_width or 4 * self.embed_dim

    @property
    def first_level(self) -> tuple[int, int]:
        """Height (and width) of the largest activations, and their channels."""
        return self.resolutions[0], self.widths[0]

    @property
    def resolutions(self) -> tuple[int, ...]:
        """Height (and width) of the activations at each level, the finest first."""
        finest = self.image_size // self.patch_size
        return tuple(finest >> level for level in range(len(self.channel_mult)))

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels at each level."""
        return tuple(self.embed_dim * mult for mult in self.channel_mult)

    def __post_init__(self):
        """Raises UserError for a value out of range or for inconsistent values."""
        super().__post_init__()
        self._check("head", self.head in HEADS, " | ".join(HEADS))
        self._check("embed_dim", self.embed_dim % 2 == 0, "an even number")
        mult, attending = self.channel_mult, self.attention_resolutions
        ok = isinstance(mult, tuple) and len(mult) > 0 and all(map(is_positive, mult))
        self._check("channel_mult", ok, "a tuple of positive integers")
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
            fits = f"a divisor of the {self.emb_width} channels of the text"
            self._check("per_head_channels", self.emb_width % self.per_head_channels == 0, fits)


@dataclasses.dataclass(frozen=True)
class BlockSpec:
    """Channels and wiring of one block of the U-Net.

    Attributes:
      skip_channels: channels of the encoder output concatenated to the input; 0 for none.
      saves_skip: whether the decoder needs the output.
    """

    in_channels: int
    out_channels: int
    skip_channels: int = 0
    resample: str | None = None
    attends: bool = False
    saves_skip: bool = False


def plan_blocks(config: UNetConfig) -> tuple[list[BlockSpec], list[BlockSpec], list[BlockSpec]]:
    """Returns the blocks of the encoder, middle and decoder in order, with all channel counts."""
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
    """A residual block and its attention, if planned: the unit of rematerialization."""

    def __init__(self, spec: BlockSpec, config: UNetConfig, *, rngs: nnx.Rngs):
        self.res = ResBlock(
            spec.in_channels + spec.skip_channels,
            spec.out_channels,
            config.emb_width,
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
            text_width=0 if config.sequence == "none" else config.emb_width,
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


class NormHead(nnx.Module):
    """The paper's head: norm, swish and a convolution that starts at zero, all in float32."""

    def __init__(self, in_channels: int, out_channels: int, *, rngs: nnx.Rngs):
        self.norm = GroupNorm(in_channels, dtype=jnp.float32)
        self.conv = nnx.Conv(in_channels, out_channels, (3, 3), kernel_init=zeros_init, rngs=rngs)

    def __call__(self, h_bhwc: jax.Array) -> jax.Array:
        return self.conv(jax.nn.silu(self.norm(h_bhwc)))


class UNet(nnx.Module):
    """The network. Its state holds only nnx.Param, so it is a pure function of a dict."""

    def __init__(self, config: UNetConfig, *, rngs: nnx.Rngs):
        encoder, middle, decoder = plan_blocks(config)
        specs = [*encoder, *middle, *decoder]
        width, dtype = config.embed_dim, jnp.dtype(config.dtype)
        self.config = config
        self.specs = tuple(specs)
        self.conditioner = Conditioner(config, width, config.per_head_channels, rngs=rngs)
        patch = config.patch_size**2
        self.stem = nnx.Conv(config.in_channels * patch, width, (3, 3), dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(spec, config, rngs=rngs) for spec in specs])
        channels = (specs[-1].out_channels, config.channels * patch)
        if config.head == "norm":
            self.head = NormHead(*channels, rngs=rngs)
        else:
            kw = {"kernel_init": zeros_init, "dtype": jnp.float32, "rngs": rngs}
            self.head = nnx.Conv(*channels, (3, 3), **kw)

    def __call__(
        self,
        z_bhwc: jax.Array,
        log_snr_b: jax.Array,
        cond: Mapping[str, jax.Array],
        *,
        run_block: Callable[..., Any] = call_block,
        dropout_key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the prediction the network is trained for, float32 in the shape of z.

        denoiser.py describes `cond` and `run_block`. Without a dropout key nothing is dropped.
        """
        conditioning = run_block(self.conditioner, log_snr_b, cond)
        patch = self.config.patch_size
        h = run_block(self.stem, space_to_depth(with_low_res(z_bhwc, cond, self.config), patch))
        skips = [h] if self.config.decoder_extra_block else []
        for i, (spec, block) in enumerate(zip(self.specs, self.blocks, strict=True)):
            skip = skips.pop() if spec.skip_channels else None
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            h = run_block(block, h, skip, conditioning, key)
            if spec.saves_skip:
                skips.append(h)
        return depth_to_space(run_block(self.head, h), patch)
