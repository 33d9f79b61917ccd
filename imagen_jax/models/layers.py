"""Layers of the U-Nets: embeddings, normalization, residual blocks, attention to image and text.

The design is ADM's (arXiv:2105.05233), which Imagen's base model adapts (arXiv:2205.11487, appendix
F.1). Text tokens join the keys and values of self-attention (appendix D.3.1), as in GLIDE
(arXiv:2112.10741). Images are [B, H, W, C]. Parameters are float32; `dtype` is the type of
activations and matrix products. Statistics and softmax are always in float32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from imagen_jax.models.attention import attention
from imagen_jax.models.resampling import downsample, upsample

zeros_init = nnx.initializers.zeros_init()
RESAMPLE = {None: lambda x: x, "down": downsample, "up": upsample}


class Conditioning(NamedTuple):
    """Conditioning passed to every block.

    emb [B, E]; text [B, T, E] and its bool mask [B, T], or None for both.
    """

    emb: jax.Array
    text: jax.Array | None
    text_mask: jax.Array | None


def sinusoidal_embedding(position_b: jax.Array, dim: int) -> jax.Array:
    """Embeds positions, roughly in [0, 1000], as cosines and sines, float32 [B, dim]; dim even."""
    half = dim // 2
    freqs = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = position_b.astype(jnp.float32)[:, None] * freqs[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def cosine_time(log_snr_b: jax.Array) -> jax.Array:
    """Returns the time in [0, 1] at which the cosine schedule has this log-SNR, float32 [B].

    It exists for any finite log-SNR, whichever schedule produced it, and it spreads the useful
    range of log-SNRs evenly (as in arXiv:2202.00512).
    """
    return (2 / jnp.pi) * jnp.arctan(jnp.exp(-0.5 * log_snr_b.astype(jnp.float32)))


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes a fraction `rate` of x and rescales the rest; without a key returns x."""
    if rate == 0.0 or key is None:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0)


def num_groups(channels: int) -> int:
    """Returns the most groups, up to 32, that divide the channels and leave 4 or more in each.

    With fewer than 8 channels there is one group.
    """
    most = min(32, max(1, channels // 4))
    return max(g for g in range(1, most + 1) if channels % g == 0)


class GroupNorm(nnx.Module):
    """Group normalization with an optional scale and shift per example (FiLM)."""

    def __init__(self, channels: int, *, dtype: Any):
        self.groups = num_groups(channels)
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, x_bhwc: jax.Array, film: tuple[jax.Array, jax.Array] | None = None):
        b, _, _, c = x_bhwc.shape
        x = x_bhwc.astype(jnp.float32)
        # Reduces pixels first, then channels, so the channel axis stays minor in the large pass.
        grouped = (b, self.groups, c // self.groups)
        mean = x.mean((1, 2)).reshape(grouped).mean(2, keepdims=True)
        mean_square = jnp.square(x).mean((1, 2)).reshape(grouped).mean(2, keepdims=True)
        mean, mean_square = (checkpoint_name(m, "statistics") for m in (mean, mean_square))
        rstd = jax.lax.rsqrt(jnp.maximum(mean_square - jnp.square(mean), 0.0) + 1e-5)
        mean_bc = jnp.broadcast_to(mean, grouped).reshape(b, c)
        scale_bc = jnp.broadcast_to(rstd, grouped).reshape(b, c) * self.scale[...][None, :]
        shift_bc = self.bias[...][None, :] - mean_bc * scale_bc
        if film is not None:
            gain, offset = (f.astype(jnp.float32) for f in film)
            scale_bc, shift_bc = scale_bc * (1.0 + gain), shift_bc * (1.0 + gain) + offset
        return (x * scale_bc[:, None, None, :] + shift_bc[:, None, None, :]).astype(self.dtype)


class ScalarEmbedding(nnx.Module):
    """Embedding of numbers in [0, 1], [B] -> [B, width]: sinusoids, then an MLP.

    The `dim` sinusoids are ADM's, for which 1 is step 1000.
    """

    def __init__(self, dim: int, width: int, *, dtype: Any, rngs: nnx.Rngs):
        self.dim = dim
        self.hidden = nnx.Linear(dim, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, x_b: jax.Array) -> jax.Array:
        return self.out(jax.nn.silu(self.hidden(sinusoidal_embedding(1000.0 * x_b, self.dim))))


def masked_mean(x_btd: jax.Array, mask_bt: jax.Array) -> jax.Array:
    """Averages the tokens whose mask is True, [B, D]; zero if there are none."""
    total = jnp.where(mask_bt[:, :, None], x_btd, 0).sum(1)
    return total / jnp.maximum(mask_bt.sum(1, keepdims=True), 1).astype(x_btd.dtype)


class TextPooling(nnx.Module):
    """Pooling of text tokens [B, T, width] to one vector [B, width], after a LayerNorm.

    "mean" averages the real tokens. "attention" uses that mean as a query over the real tokens and
    itself, as CLIP pools its image features. The mean is always a key, so no softmax is empty.
    """

    def __init__(self, kind: str, width: int, head_dim: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm = nnx.LayerNorm(width, dtype=dtype, rngs=rngs)
        self.attend = kind == "attention"
        self.head_dim = head_dim
        if self.attend:
            self.q = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
            self.k = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
            self.v = nnx.Linear(width, width, dtype=dtype, rngs=rngs)
        self.out = nnx.Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, text_btd: jax.Array, mask_bt: jax.Array) -> jax.Array:
        text = self.norm(text_btd)
        pooled = masked_mean(text, mask_bt)
        if self.attend:
            mean = pooled[:, None, :]
            tokens = jnp.concatenate([mean, text], axis=1)
            mask = jnp.concatenate([jnp.ones_like(mask_bt[:, :1]), mask_bt], axis=1)
            q, k, v = self.q(mean), self.k(tokens), self.v(tokens)
            pooled = attend(q, k, v, mask, self.head_dim)[:, 0]
        return self.out(pooled)


def attend(
    q_bsc: jax.Array, k_btc: jax.Array, v_btc: jax.Array, mask_bt: jax.Array | None, head_dim: int
) -> jax.Array:
    """Computes multi-head attention, [B, S, C], with each head's channels contiguous.

    Sharding the channels therefore shards the heads.
    """
    q, k, v = (x.reshape(*x.shape[:2], -1, head_dim) for x in (q_bsc, k_btc, v_btc))
    return attention(q, k, v, mask_bt).reshape(q_bsc.shape)


class Attention(nnx.Module):
    """Residual attention from pixels to pixels and text, with one softmax over the keys of both.

    text_width=0 removes the text keys; self_attention=False removes the pixel keys, and then an
    example without text tokens passes unchanged. Queries, keys and values have `hidden` channels,
    by default as many as the pixels. `text_norm` adds a LayerNorm on the text embeddings, which the
    paper found to help (section 2.5). The output projection starts at zero.
    """

    def __init__(
        self,
        channels: int,
        head_dim: int,
        text_width: int,
        *,
        hidden: int | None = None,
        self_attention: bool = True,
        text_norm: bool,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        hidden = hidden or channels
        kw = {"dtype": dtype, "rngs": rngs}
        self.head_dim = head_dim
        self.self_attention = self_attention
        self.use_text = text_width > 0
        self.norm = GroupNorm(channels, dtype=dtype)
        # Separate matrices: splitting one fused product costs a TPU a relayout.
        self.q = nnx.Linear(channels, hidden, **kw)
        if self_attention:
            self.k = nnx.Linear(channels, hidden, **kw)
            self.v = nnx.Linear(channels, hidden, **kw)
        if text_width:
            self.text_norm = nnx.LayerNorm(text_width, **kw) if text_norm else None
            self.text_k = nnx.Linear(text_width, hidden, **kw)
            self.text_v = nnx.Linear(text_width, hidden, **kw)
        self.out = nnx.Linear(hidden, channels, kernel_init=zeros_init, **kw)

    def __call__(self, x_bhwc: jax.Array, cond: Conditioning) -> jax.Array:
        b, h, w, c = x_bhwc.shape
        x = self.norm(x_bhwc).reshape(b, h * w, c)
        keys, values, masks = [], [], []
        if self.self_attention:
            keys.append(self.k(x))
            values.append(self.v(x))
            masks.append(jnp.ones((b, h * w), bool))
        if self.use_text:
            text = self.text_norm(cond.text) if self.text_norm is not None else cond.text
            keys.append(self.text_k(text))
            values.append(self.text_v(text))
            masks.append(cond.text_mask)
        k, v, mask = (jnp.concatenate(parts, axis=1) for parts in (keys, values, masks))
        out = self.out(attend(self.q(x), k, v, mask if self.use_text else None, self.head_dim))
        if not self.self_attention:
            out = jnp.where(mask.any(1)[:, None, None], out, 0)
        return x_bhwc + out.reshape(x_bhwc.shape)


class ResBlock(nnx.Module):
    """BigGAN-style residual block: norm, swish, resample, conv, norm with FiLM, swish, conv.

    `resample` ("down", "up" or None) applies to both branches. The second convolution starts at
    zero. Without `scale_shift` the embedding is added before the second norm instead of scaling and
    shifting its output.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_width: int,
        *,
        resample: str | None = None,
        scale_shift: bool = True,
        dropout_rate: float = 0.0,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        kw = {"dtype": dtype, "rngs": rngs}
        self.resample = resample
        self.scale_shift = scale_shift
        self.dropout_rate = dropout_rate
        self.norm1 = GroupNorm(in_channels, dtype=dtype)
        self.conv1 = nnx.Conv(in_channels, out_channels, (3, 3), **kw)
        self.emb = nnx.Linear(emb_width, (2 if scale_shift else 1) * out_channels, **kw)
        self.norm2 = GroupNorm(out_channels, dtype=dtype)
        self.conv2 = nnx.Conv(out_channels, out_channels, (3, 3), kernel_init=zeros_init, **kw)
        same = in_channels == out_channels
        self.shortcut = None if same else nnx.Linear(in_channels, out_channels, **kw)

    def __call__(self, x_bhwc: jax.Array, emb_be: jax.Array, key: jax.Array | None = None):
        resample = RESAMPLE[self.resample]
        h = checkpoint_name(self.conv1(resample(jax.nn.silu(self.norm1(x_bhwc)))), "conv")
        emb = self.emb(jax.nn.silu(emb_be))
        if self.scale_shift:
            h = self.norm2(h, film=jnp.split(emb, 2, axis=-1))
        else:
            h = self.norm2(h + emb[:, None, None, :])
        h = self.conv2(dropout(jax.nn.silu(h), self.dropout_rate, key))
        x = resample(x_bhwc)
        return h + (x if self.shortcut is None else self.shortcut(x))
