"""The Efficient U-Net of the super-resolution stages (arXiv:2205.11487, B.1, figures A.27 to A.30).

Against the ordinary U-Net it has its depth at low resolutions, and resamples in reversed order: a
level downsamples before its residual blocks and upsamples after them, so that almost nothing runs
at full resolution. It is fully convolutional: trained on crops, it draws whole images.

Read top to bottom: the config, a residual block, the scan over equal ones, the levels, the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from imagen_jax.models.denoiser import (
    Conditioner,
    NetworkConfig,
    call_block,
    is_positive,
    with_low_res,
)
from imagen_jax.models.layers import (
    Attention,
    Conditioning,
    GroupNorm,
    dropout,
    upsample,
    zeros_init,
)

SKIP = ("concat", "add")
SKIP_SCALE = 2**-0.5


@dataclasses.dataclass(frozen=True)
class EfficientUNetConfig(NetworkConfig):
    """The shape of the network; the defaults are the paper's sr256, 613,805,699 parameters.

    The paper gives widths, blocks and heads (F.2, F.3), and 600M (sr256) and 400M (sr1024), which
    no one reading of its figures meets. What they leave open:
    - How a skip joins: every block of a decoder level is fed the output of one encoder block,
      scaled by 1/sqrt(2) and concatenated, or added.
    - How wide the time embedding and the text tokens are: as wide as in the base model, 2048, or 4
      times the first level, 512.

                        sr256    sr1024 (self_attention=False)
        concat, 2048    614M *   605M
        concat,  512    559M     551M
        add,    2048    506M     498M
        add,     512    451M     443M *        * chosen: the nearest

    Attention after every block instead of once a level would come to 598M with "add" and 512, but
    is not what figure A.28 shows. Leaving out the 1x1 convolutions of blocks that keep their width
    would save 22M ("add") or 11M ("concat").

    Attributes, besides those of NetworkConfig:
      widths: channels of each level; each has half the resolution of the one before, and the first
        half that of the image.
      num_res_blocks: residual blocks of each level, in the encoder and again in the decoder.
      skip: how a skip joins, "concat" or "add".
      num_heads: of the attention, which the last level has after its blocks, on both sides. Its
        queries, keys and values are twice as wide as the level. Also of the text pooling.
      self_attention: pixels attend to pixels as well as to text; without, to text alone (sr1024).
      scan_blocks: the equal blocks of a level are compiled once and looped over, with the same
        parameters. Compiling is then quicker, and takes no longer with more of them; but a step
        takes a third longer on a TPU, which fills and empties the loop's buffers, and many times as
        long on a CPU, where XLA is slow at the gradient of a convolution inside a loop.
    """

    image_size: int = 256
    low_res: int = 64
    cond_width: int = 2048
    widths: tuple[int, ...] = (128, 256, 512, 1024)
    num_res_blocks: tuple[int, ...] = (2, 4, 8, 8)
    skip: str = "concat"
    num_heads: int = 8
    self_attention: bool = True
    scan_blocks: bool = False

    @property
    def emb_width(self) -> int:
        return self.cond_width or 4 * self.widths[0]

    @property
    def first_level(self) -> tuple[int, int]:
        """Height (and width) of the largest activations of blocks, and their channels."""
        return self.image_size // 2, self.widths[0]

    def __post_init__(self):
        """Raises UserError for a value out of range, or values that do not fit together."""
        super().__post_init__()
        for key in ("widths", "num_res_blocks"):
            value = getattr(self, key)
            ok = isinstance(value, tuple) and len(value) > 0 and all(map(is_positive, value))
            self._check(key, ok, "a tuple of positive integers")
        levels = len(self.widths)
        fits = f"one number for each of the {levels} widths"
        self._check("num_res_blocks", len(self.num_res_blocks) == levels, fits)
        self._check("widths", all(width % 2 == 0 for width in self.widths), "of even numbers")
        factor = 2**levels
        self._check("image_size", self.image_size % factor == 0, f"a multiple of {factor}")
        self._check("skip", self.skip in SKIP, " | ".join(SKIP))
        for of, width in (("attention", 2 * self.widths[-1]), ("text", self.emb_width)):
            fits = f"a divisor of the {width} channels of the {of}"
            self._check("num_heads", width % self.num_heads == 0, fits)


class ResNetBlock(nnx.Module):
    """Figure A.27, fed a skip from the encoder if it is one of the decoder's.

    Norm, swish and convolution, twice; a 1x1 convolution on the other branch. The second 3x3
    convolution starts at zero.
    """

    def __init__(
        self, channels: int, config: EfficientUNetConfig, *, decodes: bool, rngs: nnx.Rngs
    ):
        dtype = jnp.dtype(config.dtype)
        kw = {"dtype": dtype, "rngs": rngs}
        self.concat = decodes and config.skip == "concat"
        self.dropout_rate = config.dropout
        in_channels = 2 * channels if self.concat else channels
        self.norm1 = GroupNorm(in_channels, dtype=dtype)
        self.conv1 = nnx.Conv(in_channels, channels, (3, 3), **kw)
        self.norm2 = GroupNorm(channels, dtype=dtype)
        self.conv2 = nnx.Conv(channels, channels, (3, 3), kernel_init=zeros_init, **kw)
        self.shortcut = nnx.Linear(in_channels, channels, **kw)

    def __call__(self, x_bhwc: jax.Array, skip_bhwc: jax.Array | None, key: jax.Array | None):
        x = x_bhwc
        if skip_bhwc is not None:
            skip = SKIP_SCALE * skip_bhwc
            x = jnp.concatenate([x, skip], axis=-1) if self.concat else x + skip
        h = checkpoint_name(self.conv1(jax.nn.silu(self.norm1(x))), "conv")
        h = dropout(jax.nn.silu(self.norm2(h)), self.dropout_rate, key)
        return self.shortcut(x) + self.conv2(h)


class Blocks(nnx.Module):
    """Equal residual blocks in a row, as one whose parameters have the number of the block first.

    The decoder's run from the last to the first, each fed the output of the encoder's block of the
    same number.
    """

    def __init__(
        self,
        count: int,
        channels: int,
        config: EfficientUNetConfig,
        *,
        decodes: bool,
        rngs: nnx.Rngs,
    ):
        def make(key):
            return ResNetBlock(channels, config, decodes=decodes, rngs=nnx.Rngs(key))

        self.count = count
        self.decodes = decodes
        self.unroll = not config.scan_blocks
        self.stacked = nnx.vmap(make)(jax.random.split(rngs.params(), count))

    def __call__(
        self,
        h_bhwc: jax.Array,
        skips_nbhwc: jax.Array | None,
        run_block: Callable[..., Any],
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The last block's output and, in the encoder, those of all, [count, B, H, W, C]."""
        graphdef, stacked = nnx.split(self.stacked)

        def step(h, numbered):
            i, params, skip = numbered
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            h = run_block(nnx.merge(graphdef, params), h, skip, key)
            return h, None if self.decodes else h

        each = (jnp.arange(self.count), stacked, skips_nbhwc)
        if not self.unroll:
            return jax.lax.scan(step, h_bhwc, each, reverse=self.decodes)
        # Not scan's own unrolling, which leaves a loop around a single block.
        h, outputs = h_bhwc, []
        for i in reversed(range(self.count)) if self.decodes else range(self.count):
            h, output = step(h, jax.tree.map(lambda x, i=i: x[i], each))
            outputs.append(output)
        return h, None if self.decodes else jnp.stack(outputs)


class CombineEmbs(nnx.Module):
    """Scales and shifts the channels by the embedding of time, augmentation and pooled text."""

    def __init__(self, channels: int, config: EfficientUNetConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.emb = nnx.Linear(config.emb_width, 2 * channels, dtype=dtype, rngs=rngs)

    def __call__(self, h_bhwc: jax.Array, emb_be: jax.Array) -> jax.Array:
        film = self.emb(jax.nn.silu(emb_be)).astype(jnp.float32)[:, None, None, :]
        scale, shift = jnp.split(film, 2, axis=-1)
        return (h_bhwc * (1.0 + scale) + shift).astype(h_bhwc.dtype)


class Upsample(nnx.Module):
    """Doubles height and width, then convolves."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = nnx.Conv(in_channels, out_channels, (3, 3), dtype=dtype, rngs=rngs)

    def __call__(self, h_bhwc: jax.Array) -> jax.Array:
        return self.conv(upsample(h_bhwc))


class Level(nnx.Module):
    """A DBlock (figure A.28), or with `decodes` a UBlock (figure A.29).

    A DBlock halves the resolution by a strided convolution, from outer_channels to its width,
    before anything else; a UBlock doubles it by a convolution to outer_channels, after all else.
    """

    def __init__(self, index: int, config: EfficientUNetConfig, *, decodes: bool, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        kw = {"dtype": dtype, "rngs": rngs}
        width, outer = config.widths[index], config.widths[max(index - 1, 0)]
        self.decodes = decodes
        if decodes:
            self.resample = Upsample(width, outer, **kw)
        else:
            self.resample = nnx.Conv(outer, width, (3, 3), strides=2, **kw)
        self.combine = CombineEmbs(width, config, rngs=rngs)
        count = config.num_res_blocks[index]
        self.blocks = Blocks(count, width, config, decodes=decodes, rngs=rngs)
        reads_text = config.sequence != "none"
        attention = partial(
            Attention,
            width,
            2 * width // config.num_heads,
            config.emb_width if reads_text else 0,
            hidden=2 * width,
            self_attention=config.self_attention,
            text_norm=config.sequence == "cross_attention_layernorm",
            **kw,
        )
        attends = index == len(config.widths) - 1 and (config.self_attention or reads_text)
        self.attention = attention() if attends else None

    def __call__(
        self,
        h_bhwc: jax.Array,
        skips_nbhwc: jax.Array | None,
        cond: Conditioning,
        run_block: Callable[..., Any],
        dropout_key: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """The level's output and, of a DBlock, what its UBlock gets as skips."""
        h = h_bhwc if self.decodes else run_block(self.resample, h_bhwc)
        h = run_block(self.combine, h, cond.emb)
        h, saved = self.blocks(h, skips_nbhwc, run_block, dropout_key)
        if self.attention is not None:
            h = run_block(self.attention, h, cond)
        return (run_block(self.resample, h) if self.decodes else h), saved


class EfficientUNet(nnx.Module):
    """The network (figure A.30). Its state holds nnx.Param only."""

    def __init__(self, config: EfficientUNetConfig, *, rngs: nnx.Rngs):
        width, levels = config.widths[0], range(len(config.widths))
        self.config = config
        head_dim = config.emb_width // config.num_heads
        self.conditioner = Conditioner(config, width, head_dim, rngs=rngs)
        dtype = jnp.dtype(config.dtype)
        self.stem = nnx.Conv(config.in_channels, width, (3, 3), dtype=dtype, rngs=rngs)
        self.encoder = nnx.List([Level(i, config, decodes=False, rngs=rngs) for i in levels])
        self.decoder = nnx.List([Level(i, config, decodes=True, rngs=rngs) for i in levels])
        # In float32, and with no norm before it: a norm would take the color of an even crop away.
        self.head = nnx.Linear(width, config.channels, kernel_init=zeros_init, rngs=rngs)

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

        z may be of any size that is a multiple of 2^levels, and low_res of any size. `cond` and
        `run_block` are those of network.py; where blocks are scanned, run_block gets the weights of
        one. Without a dropout key nothing is dropped.
        """

        def key(i):
            return None if dropout_key is None else jax.random.fold_in(dropout_key, i)

        conditioning = run_block(self.conditioner, log_snr_b, cond)
        h = run_block(self.stem, with_low_res(z_bhwc, cond, self.config))
        levels = list(enumerate(zip(self.encoder, self.decoder, strict=True)))
        skips = []
        for i, (encode, _) in levels:
            h, saved = encode(h, None, conditioning, run_block, key(2 * i))
            skips.append(saved)
        for i, (_, decode) in reversed(levels):
            h, _ = decode(h, skips[i], conditioning, run_block, key(2 * i + 1))
        return run_block(self.head, h)
