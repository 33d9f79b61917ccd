"""Shared by torch_transformer.py and torch_unet.py: weights, embeddings, text. Needs torch,
safetensors and NumPy.

Images are [B, C, H, W] here and [B, H, W, C] in imagen_jax. Modules have the names that tensors
have in the file, so that `load` only transposes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F


def load(folder: str | Path, build: Callable[[dict], nn.Module]) -> nn.Module:
    """Builds the network of an exported stage and loads its weights, in float32.

    Args:
      build: config -> network.
    """
    folder = Path(folder)
    network = build(json.loads((folder / "config.json").read_text()))
    tensors = load_file(folder / "model.safetensors")
    network.load_state_dict(dict(renamed(name, x.float()) for name, x in tensors.items()))
    return network.eval()


def renamed(name: str, x: Tensor) -> tuple[str, Tensor]:
    """Converts a tensor to torch's names and order of axes."""
    module, _, leaf = name.rpartition(".")
    if leaf == "kernel":  # [in, out], or [height, width, in, out]
        x = x.T if x.ndim == 2 else x.permute(3, 2, 0, 1)
    return f"{module}.{ {'kernel': 'weight', 'scale': 'weight'}.get(leaf, leaf) }", x.contiguous()


def sinusoids(x: Tensor, dim: int) -> Tensor:
    """Embeds numbers [N] as cosines and sines, [N, dim]."""
    freqs = torch.exp(-math.log(10_000) * torch.arange(dim // 2) / (dim // 2))
    angles = x[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def fold(x: Tensor, size: int) -> Tensor:
    """Folds each size x size square of pixels into channels: [B, C size^2, H/size, W/size]."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return x.reshape(b, size * size * c, h // size, w // size)


def unfold(x: Tensor, size: int) -> Tensor:
    """Inverts `fold`."""
    b, c, h, w = x.shape
    x = x.reshape(b, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(b, c // size**2, h * size, w * size)


def with_low_res(z: Tensor, low_res: Tensor | None) -> Tensor:
    """Appends the low-resolution image, enlarged to the size of z, to the channels of z."""
    return z if low_res is None else torch.cat([z, enlarged(low_res, z)], dim=1)


def add_low_res(out: Tensor, low_res: Tensor, aug_level: Tensor) -> Tensor:
    """Adds the enlarged low-resolution image, less the more noise it has (model.low_res_skip)."""
    angle = (math.pi / 2 * aug_level)[:, None, None, None]
    alpha, sigma = torch.cos(angle), torch.sin(angle)
    return out + alpha / (alpha**2 + 4 * sigma**2) * enlarged(low_res, out)


def enlarged(low_res: Tensor, z: Tensor) -> Tensor:
    """Enlarges the low-resolution image to the size of z."""
    return F.interpolate(low_res, size=z.shape[2:], mode="bilinear", align_corners=False)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, head_dim: int) -> Tensor:
    """Multi-head attention, [B, S, C]; `mask` bool [B, T] is False for keys to ignore."""
    q, k, v = (x.unflatten(-1, (-1, head_dim)).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


class ScalarEmbedding(nn.Module):
    """Embeds numbers in [0, 1]."""

    def __init__(self, dim: int, width: int):
        super().__init__()
        self.dim = dim
        self.hidden, self.out = nn.Linear(dim, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.hidden(sinusoids(1000 * x, self.dim))))


class TextPooling(nn.Module):
    """Pools text tokens to a vector: their mean, or attention with the mean as the query."""

    def __init__(self, kind: str, width: int, head_dim: int):
        super().__init__()
        self.attention, self.head_dim = kind == "attention", head_dim
        self.norm = nn.LayerNorm(width, eps=1e-6)
        if self.attention:
            self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, text: Tensor, mask: Tensor) -> Tensor:
        text = self.norm(text)
        pooled = (text * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        if self.attention:
            mean = pooled[:, None]
            tokens = torch.cat([mean, text], dim=1)
            mask = F.pad(mask, (1, 0), value=True)
            q, k, v = self.q(mean), self.k(tokens), self.v(tokens)
            pooled = attend(q, k, v, mask, self.head_dim)[:, 0]
        return self.out(pooled)


class Conditioner(nn.Module):
    """Log-SNR, noise level and text -> an embedding [B, width] and tokens [B, T, width]."""

    def __init__(self, config: dict, time_dim: int, width: int, head_dim: int):
        super().__init__()
        text = config["text"]
        if "+" in text["encoder"]:
            raise NotImplementedError("several text encoders")
        self.time = ScalarEmbedding(time_dim, width)
        self.aug = ScalarEmbedding(time_dim, width) if config["model"]["low_res"] else None
        reads_text = text["pooling"] != "none" or text["sequence"] != "none"
        self.text = nn.Linear(text["dim"], width, bias=False) if reads_text else None
        pools = text["pooling"] != "none"
        self.pool = TextPooling(text["pooling"], width, head_dim) if pools else None

    def forward(
        self, log_snr: Tensor, text: Tensor, mask: Tensor, aug_level: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        emb = self.time(2 / math.pi * torch.atan(torch.exp(-log_snr / 2)))
        if self.aug is not None:
            emb = emb + self.aug(aug_level)
        tokens = None if self.text is None else self.text(text)
        return emb if self.pool is None else emb + self.pool(tokens, mask), tokens


def show(network: nn.Module, config: dict) -> None:
    """Denoises pure noise with the null prompt, and prints what the result looks like."""
    size, low = config["model"]["image_size"], config["model"]["low_res"]
    tokens, width = config["text"]["max_tokens"], config["text"]["dim"]
    mask = torch.arange(tokens)[None] == 0  # the null prompt is one token of zeros
    more = (torch.zeros(1, 3, low, low), torch.full((1,), 0.1)) if low else ()
    with torch.no_grad():
        z, log_snr = torch.randn(1, 3, size, size), torch.zeros(1)
        out = network(z, log_snr, torch.zeros(1, tokens, width), mask, *more)
    count = sum(p.numel() for p in network.parameters())
    print(f"{count:,} parameters; output {tuple(out.shape)}, standard deviation {out.std():.3f}")
