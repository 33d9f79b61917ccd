"""The Efficient U-Net of the super-resolution stages.

Source: arXiv:2205.11487, appendix B.1, figures A.27 to A.30. It differs from the ordinary U-Net in
two ways. Most of its blocks are at low resolutions. And it resamples in the opposite order: a level
downsamples before its residual blocks and upsamples after them, so almost nothing runs at full
resolution. The network is fully convolutional: it trains on crops and samples whole images.

Reading order: the config, a residual block, a stack of blocks, the levels, the network.
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
from imagen_jax.models.layers import Attention, Conditioning, GroupNorm, dropout, zeros_init
from imagen_jax.models.resampling import Upsample

SKIP = ("concat", "add")
SKIP_SCALE = 2**-0.5


@dataclasses.dataclass(frozen=True)
class EfficientUNetConfig(NetworkConfig):
    """Hyperparameters; the defaults are the paper's sr256, 613,805,699 parameters.

    The paper gives widths, blocks and heads (appendices F.2 and F.3) and the totals 600M (sr256)
    and 400M (sr1024). No single reading of its figures meets both totals. The paper leaves open:
    - How a skip joins the decoder. Every decoder block receives the output of one encoder block,
      scaled by 1/sqrt(2), which is either concatenated or added.
    - How wide the time embedding and the text tokens are: 2048 as in the base model, or 512, which
      is 4 times the width of the first level.

                        sr256    sr1024 (self_attention=False)
        concat, 2048    614M *   605M
        concat,  512    559M     551M
        add,    2048    506M     498M
        add,     512    451M     443M *        * chosen: the nearest

    Attention after every block instead of once per level would give 598M with "add" and 512, but
    figure A.28 shows one attention layer per level. Removing the 1x1 convolution from blocks that
    keep their width would save 22M ("add") or 11M ("concat").

    Attributes, in addition to those of NetworkConfig:
      widths: channels of each level. Each level has half the resolution of the previous one; the
        first has half the resolution of the image.
      num_res_blocks: residual blocks of each level, in the encoder and again in the decoder.
      skip: how a skip joins the decoder, "concat" or "add".
      num_heads: attention heads, in the text pooling and in the last level, which attends after its
        blocks in both encoder and decoder. Queries, keys and values have twice the level's width.
      self_attention: whether pixels attend to pixels as well as to text; if False, they attend to
        text only (sr1024).
      scan_blocks: compile the equal blocks of a level once and loop over them. The parameters are
        the same. Compile time then does not grow with the number of blocks, but a step takes a
        third longer on a TPU, which fills and empties the loop's buffers. On a CPU it takes many
        times as long, because XLA is slow at the gradient of a convolution inside a loop.
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
        """Height (and width) of the largest block activations, and their channels."""
        return self.image_size // 2, self.widths[0]

    def __post_init__(self):
        """Raises UserError for a value out of range or for inconsistent values."""
        super().__post_init__()
        for key in ("widths", "num_res_blocks"):
            value = getattr(self, key)
            ok = isinstance(value, tuple) and len(value) > 0 and all(map(is_positive, value))
            self._check(key, ok, "a tuple of positive integers")
        levels = len(self.widths)
        fits = f"one number for each of the {levels} widths"
        self._check("num_res_blocks", len(self.num_res_blocks) == levels, fits)
        self._check("widths", all(width % 2 == 0 for width in self.widths), "even numbers")
        factor = 2**levels
        self._check("image_size", self.image_size % factor == 0, f"a multiple of {factor}")
        self._check("skip", self.skip in SKIP, " | ".join(SKIP))
        for part, width in (("attention", 2 * self.widths[-1]), ("text", self.emb_width)):
            fits = f"a divisor of the {width} channels of the {part}"
            self._check("num_heads", width % self.num_heads == 0, fits)


class ResNetBlock(nnx.Module):
    """Residual block of figure A.27; in the decoder it also takes a skip from the encoder.

    One branch is norm, swish, 3x3 convolution, twice; the other is a 1x1 convolution. The second
    3x3 convolution starts at zero.
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
    """A stack of equal residual blocks; the leading axis of each parameter is the block index.

    The decoder runs its blocks from last to first. Each takes the output of the encoder block with
    the same index.
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
        """Returns the last output and, in the encoder, every output, [count, B, H, W, C]."""
        graphdef, stacked = nnx.split(self.stacked)

        def step(h, numbered):
            i, params, skip = numbered
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            h = run_block(nnx.merge(graphdef, params), h, skip, key)
            return h, None if self.decodes else h

        each = (jnp.arange(self.count), stacked, skips_nbhwc)
        if not self.unroll:
            return jax.lax.scan(step, h_bhwc, each, reverse=self.decodes)
        # scan(unroll=count) still leaves a loop of one iteration in the program.
        h, outputs = h_bhwc, []
        for i in reversed(range(self.count)) if self.decodes else range(self.count):
            h, output = step(h, jax.tree.map(lambda x, i=i: x[i], each))
            outputs.append(output)
        return h, None if self.decodes else jnp.stack(outputs)


class CombineEmbs(nnx.Module):
    """Scale and shift of channels by the embedding of time, aug_level and pooled text."""

    def __init__(self, channels: int, config: EfficientUNetConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.emb = nnx.Linear(config.emb_width, 2 * channels, dtype=dtype, rngs=rngs)

    def __call__(self, h_bhwc: jax.Array, emb_be: jax.Array) -> jax.Array:
        film = self.emb(jax.nn.silu(emb_be)).astype(jnp.float32)[:, None, None, :]
        scale, shift = jnp.split(film, 2, axis=-1)
        return (h_bhwc * (1.0 + scale) + shift).astype(h_bhwc.dtype)


class Level(nnx.Module):
    """A DBlock (figure A.28), or a UBlock (figure A.29) if `decodes` is set.

    A DBlock starts with a strided convolution, which halves the resolution and takes the previous
    level's width to its own. A UBlock ends with a transposed one, which reverses both.
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
        """Returns the level's output and, from a DBlock, the skips for its UBlock."""
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
        # Float32, with no norm before it: a norm would erase the color of a uniform crop.
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
        """Returns the prediction the network is trained for, float32 in the shape of z.

        The height and width of z may be any multiple of 2^levels; low_res may have any size.
        denoiser.py describes `cond` and `run_block`. With scan_blocks, run_block receives the
        weights of one block at a time. Without a dropout key nothing is dropped.
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
