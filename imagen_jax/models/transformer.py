"""The pixel transformer: patches of a noisy image, log-SNR and text -> raw prediction.

Source: JiT (Just image Transformers), arXiv:2511.13720. It is made for x-prediction: a patch of
noise has more values than a narrow network can carry, but a patch of an image lies close to a
surface of few dimensions. Differences from JiT:

- Text takes the place of the class. The pooled text is added to the time embedding, and the tokens
  join the attention of every block (`text_tokens`). JiT repeats one class token 32 times instead,
  and adds it only after the first blocks.
- Queries, keys and values have a matrix each, as do the two halves of the MLP. Slices of a fused
  product would cross the shards of the tensor axis, and cost a TPU a relayout.
- A super-resolution network has no absolute positions: it trains on crops and samples whole images.

token_layers.py has the parts. Reading order here: the config, attention, a block, the embeddings of
patches and text, the head, the network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from imagen_jax.models.attention import attention
from imagen_jax.models.denoiser import Conditioner, NetworkConfig, call_block, with_low_res
from imagen_jax.models.layers import zeros_init
from imagen_jax.models.products import Linear
from imagen_jax.models.resampling import depth_to_space, space_to_depth
from imagen_jax.models.token_layers import (
    MLP,
    Modulation,
    RMSNorm,
    absolute_positions,
    modulated,
    no_rotations,
    product,
    rotate,
    rotations,
)

TEXT_TOKENS = ("sequence", "keys")
TIME_DIM = 256  # sinusoids in the time embedding, as in JiT


@dataclasses.dataclass(frozen=True)
class TransformerConfig(NetworkConfig):
    """Hyperparameters; the defaults are configs/transformer64.py, 1,956,237,360 parameters.

    A block has (10 + 3 mlp_ratio) width^2 parameters if cond_width is the width; 6 of the 10 belong
    to the modulation, which costs next to no time. A TPU shards a matrix 64 ways into whole tiles
    if its rows are a multiple of 1,024, so prefer such widths and hidden widths.

    Attributes, in addition to those of NetworkConfig (cond_width 0 means `width`):
      patch_size: side of the pixel squares that become a token. The sequence has
        (image_size / patch_size)^2 of them, 256 in JiT.
      width: channels of a token.
      depth: number of blocks.
      head_dim: channels of an attention head.
      mlp_ratio: hidden channels of the SwiGLU MLP over `width`; 8/3 in JiT.
      bottleneck: channels between the pixels of a patch and the token; 0 for a direct projection.
        JiT has 128 or 256 for the 768 values of a patch of 16.
      text_tokens: how tokens enter attention, unless text.sequence is "none". "sequence": as tokens
        of the sequence, which every block updates. "keys": as keys and values only, which costs
        less for long texts.
      text_patch_size: consecutive text tokens that are joined to one. A word has about 5 bytes, so
        with a byte-level encoder 4 makes attention and its keys cheaper and loses little.
      scan_blocks: compile one block and loop over it, so that compile time does not grow with the
        depth. The parameters are the same, but each step stacks them, and on a CPU products in a
        loop are slower.
    """

    patch_size: int = 4
    width: int = 2048
    depth: int = 24
    head_dim: int = 128
    mlp_ratio: float = 3.0
    bottleneck: int = 0
    text_tokens: str = "sequence"
    text_patch_size: int = 1
    scan_blocks: bool = False

    @property
    def emb_width(self) -> int:
        return self.cond_width or self.width

    @property
    def first_level(self) -> tuple[int, int]:
        """Height (and width) of the grid of patches, and the channels of a token."""
        return self.image_size // self.patch_size, self.width

    @property
    def hidden(self) -> int:
        """Hidden channels of the MLP."""
        return round(self.width * self.mlp_ratio)

    def __post_init__(self):
        """Raises UserError for a value out of range or for inconsistent values."""
        super().__post_init__()
        fits = f"a multiple of the patch size, {self.patch_size}"
        self._check("image_size", self.image_size % self.patch_size == 0, fits)
        self._check("head_dim", self.head_dim % 4 == 0, "a multiple of 4")
        fits = f"a divisor of the {self.width} channels of a token"
        self._check("head_dim", self.width % self.head_dim == 0, fits)
        if self.pooling == "attention":
            fits = f"a divisor of the {self.emb_width} channels of the text"
            self._check("head_dim", self.emb_width % self.head_dim == 0, fits)
        number = isinstance(self.mlp_ratio, (int, float)) and not isinstance(self.mlp_ratio, bool)
        self._check("mlp_ratio", number and self.mlp_ratio > 0 and self.hidden > 0, "above 0")
        self._check("text_tokens", self.text_tokens in TEXT_TOKENS, " | ".join(TEXT_TOKENS))


class Tokens(NamedTuple):
    """What attention knows about the tokens, in every block.

    rotation [B, S, 2, head_dim] of the S tokens of the sequence; text [B, T, width], tokens that
    are only keys and values, or None; mask bool [B, S] or [B, S + T], False for padding, or None.
    """

    rotation: jax.Array
    text: jax.Array | None
    mask: jax.Array | None


class SelfAttention(nnx.Module):
    """Attention with normalized, rotated queries and keys; text keys are not rotated."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, kw = config.width, {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.head_dim = config.head_dim
        self.q, self.k, self.v = (Linear(width, width, **kw) for _ in range(3))
        self.q_norm, self.k_norm = (RMSNorm(config.head_dim) for _ in range(2))
        if config.sequence != "none" and config.text_tokens == "keys":
            self.text_k, self.text_v = (Linear(width, width, **kw) for _ in range(2))
        self.out = Linear(width, width, **kw)

    def __call__(self, x_bsc: jax.Array, tokens: Tokens) -> jax.Array:
        def heads(linear, x):
            return product(linear, x).reshape(*x.shape[:2], -1, self.head_dim)

        q = rotate(self.q_norm(heads(self.q, x_bsc)), tokens.rotation).astype(x_bsc.dtype)
        k = rotate(self.k_norm(heads(self.k, x_bsc)), tokens.rotation).astype(x_bsc.dtype)
        v = heads(self.v, x_bsc)
        if tokens.text is not None:
            text_k = self.k_norm(heads(self.text_k, tokens.text))
            k = jnp.concatenate([k, text_k.astype(k.dtype)], axis=1)
            v = jnp.concatenate([v, heads(self.text_v, tokens.text)], axis=1)
        return product(self.out, attention(q, k, v, tokens.mask).reshape(x_bsc.shape))


class Block(nnx.Module):
    """Attention, then the MLP; both modulated and gated. A new block returns its input."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        kw = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.modulation = Modulation(6, config.emb_width, config.width, **kw)
        self.norm1, self.norm2 = (RMSNorm(config.width) for _ in range(2))
        self.attention = SelfAttention(config, rngs=rngs)
        self.mlp = MLP(config.width, config.hidden, config.dropout, **kw)

    def __call__(
        self, h_bsc: jax.Array, tokens: Tokens, emb_be: jax.Array, key: jax.Array | None
    ) -> jax.Array:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb_be)
        out = self.attention(modulated(self.norm1, h_bsc, shift1, scale1), tokens)
        h = (h_bsc + gate1 * out).astype(h_bsc.dtype)
        out = self.mlp(modulated(self.norm2, h, shift2, scale2), key)
        return (h + gate2 * out).astype(h.dtype)


class PatchEmbedding(nnx.Module):
    """Patches [B, h, w, values] -> tokens [B, h * w, width], through the bottleneck if any."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        kw = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        values = config.in_channels * config.patch_size**2
        narrow = config.bottleneck
        self.squeeze = Linear(values, narrow, use_bias=False, **kw) if narrow else None
        self.out = Linear(narrow or values, config.width, **kw)
        self.absolute = not config.low_res

    def __call__(self, patches_bhwc: jax.Array) -> jax.Array:
        b, height, width, _ = patches_bhwc.shape
        x = patches_bhwc.reshape(b, height * width, -1)
        h = self.out(x if self.squeeze is None else self.squeeze(x))
        if self.absolute:
            h = h + absolute_positions(height, width, h.shape[-1]).astype(h.dtype)[None]
        return h


class TextEmbedding(nnx.Module):
    """Text [B, T, emb_width] and its mask [B, T] -> tokens [B, S, width] and theirs [B, S].

    S is T / text_patch_size, rounded up. Padding within a patch is zero.

    The bias tells text from image. It starts at random so that the tokens of the null prompt, which
    are zero before it, are never the zero vector, where norms have a steep gradient.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        width, kw = config.emb_width, {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        normed = config.sequence == "cross_attention_layernorm"
        self.norm = nnx.LayerNorm(width, **kw) if normed else None
        self.patch = config.text_patch_size
        bias_init = nnx.initializers.normal(0.02)
        self.out = Linear(self.patch * width, config.width, bias_init=bias_init, **kw)

    def __call__(self, text_bte: jax.Array, mask_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        text = text_bte if self.norm is None else self.norm(text_bte)
        if self.patch > 1:
            b, tokens, width = text.shape
            pad = -tokens % self.patch
            text = jnp.pad(text * mask_bt[..., None], ((0, 0), (0, pad), (0, 0)))
            text = text.reshape(b, -1, self.patch * width)
            mask_bt = jnp.pad(mask_bt, ((0, 0), (0, pad))).reshape(b, -1, self.patch).any(-1)
        return self.out(text), mask_bt


class Head(nnx.Module):
    """Norm, modulation and a projection to the values of a patch, zero at the start, in float32."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        values = config.channels * config.patch_size**2
        kw = {"dtype": jnp.dtype(config.dtype), "rngs": rngs}
        self.modulation = Modulation(2, config.emb_width, config.width, **kw)
        self.norm = RMSNorm(config.width)
        self.out = Linear(config.width, values, kernel_init=zeros_init, rngs=rngs)

    def __call__(self, h_bsc: jax.Array, emb_be: jax.Array) -> jax.Array:
        h = h_bsc.astype(jnp.float32)
        return self.out(modulated(self.norm, h, *self.modulation(emb_be)))


class Transformer(nnx.Module):
    """The network. Its state holds only nnx.Param, so it is a pure function of a dict."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.conditioner = Conditioner(config, TIME_DIM, config.head_dim, rngs=rngs)
        self.patches = PatchEmbedding(config, rngs=rngs)
        self.text = TextEmbedding(config, rngs=rngs) if config.sequence != "none" else None
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.head = Head(config, rngs=rngs)

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

        The height and width of z may be any multiples of patch_size. denoiser.py describes `cond`
        and `run_block`. Without a dropout key nothing is dropped.
        """
        patch = self.config.patch_size
        patches = space_to_depth(with_low_res(z_bhwc, cond, self.config), patch)
        conditioning = run_block(self.conditioner, log_snr_b, cond)
        h = run_block(self.patches, patches)
        text, mask = conditioning.text, conditioning.text_mask
        text, mask = (None, None) if self.text is None else run_block(self.text, text, mask)
        h, tokens = self._sequence(h, patches.shape[1:3], text, mask)
        h = self._blocks(h, tokens, conditioning.emb, run_block, dropout_key)
        b, height, width, _ = patches.shape
        out = run_block(self.head, h[:, : height * width], conditioning.emb)
        return depth_to_space(out.reshape(b, height, width, -1), patch)

    def _sequence(
        self,
        h_bsc: jax.Array,
        grid: tuple[int, int],
        text_btc: jax.Array | None,
        mask_bt: jax.Array | None,
    ) -> tuple[jax.Array, Tokens]:
        """Returns the sequence, patches first, and what attention knows about its tokens."""
        b, num_patches, _ = h_bsc.shape
        head_dim, mask = self.config.head_dim, None
        rotation = rotations(*grid, head_dim)
        if text_btc is not None:
            mask = jnp.concatenate([jnp.ones((b, num_patches), bool), mask_bt], axis=1)
            if self.config.text_tokens == "sequence":
                rotation = jnp.concatenate([rotation, no_rotations(text_btc.shape[1], head_dim)])
                h_bsc, text_btc = jnp.concatenate([h_bsc, text_btc], axis=1), None
        rotation = jnp.broadcast_to(rotation[None], (b, *rotation.shape))
        return h_bsc, Tokens(rotation, text_btc, mask)

    def _blocks(
        self,
        h_bsc: jax.Array,
        tokens: Tokens,
        emb_be: jax.Array,
        run_block: Callable[..., Any],
        dropout_key: jax.Array | None,
    ) -> jax.Array:
        """Runs the blocks in turn, or in a loop over their stacked parameters."""
        graphdef, states = nnx.split(self.blocks[0])[0], [nnx.state(b) for b in self.blocks]

        def step(h, numbered):
            i, params = numbered
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            return run_block(nnx.merge(graphdef, params), h, tokens, emb_be, key), None

        if self.config.scan_blocks:
            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *states)
            return jax.lax.scan(step, h_bsc, (jnp.arange(len(states)), stacked))[0]
        for numbered in enumerate(states):
            h_bsc, _ = step(h_bsc, numbered)
        return h_bsc
