"""The pixel transformer in PyTorch, with exported weights; model.name is "transformer".

python -m imagen_jax.export --workdir=runs/demo --out=exports/demo
python examples/torch_transformer.py exports/demo

network = load("exports/demo", Transformer)
output = network(z, log_snr, text, text_mask)
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_layers import (
    Conditioner,
    add_low_res,
    fold,
    load,
    show,
    sinusoids,
    unfold,
    with_low_res,
)

TIME_DIM = 256


def rows_and_columns(height: int, width: int) -> list[Tensor]:
    """Returns the row and the column of every patch, [height * width] each."""
    grid = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return [x.flatten().float() for x in grid]


def rotations(height: int, width: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Returns cosines and signed sines, [patches, head_dim]: angles of the row, then the column."""
    count = head_dim // 4
    freqs = 10_000.0 ** (-torch.arange(count) / count)
    angles = torch.cat([p[:, None] * freqs for p in rows_and_columns(height, width)], dim=-1)
    return angles.cos().repeat(1, 2), torch.cat([-angles.sin(), angles.sin()], dim=-1)


class Modulation(nn.Module):
    """`count` vectors per example, [B, 1, width] each."""

    def __init__(self, count: int, emb_width: int, width: int):
        super().__init__()
        self.count, self.linear = count, nn.Linear(emb_width, count * width)

    def forward(self, emb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(emb))[:, None].chunk(self.count, dim=-1)


class Attention(nn.Module):
    """Self-attention with normalized, rotated queries and keys; text keys are not rotated."""

    def __init__(self, width: int, head_dim: int, text_keys: bool):
        super().__init__()
        self.head_dim = head_dim
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(head_dim, eps=1e-6) for _ in range(2))
        if text_keys:
            self.text_k, self.text_v = (nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, rotation: tuple, text: Tensor | None, mask: Tensor) -> Tensor:
        cos, sin = rotation

        def heads(x):  # [B, heads, S, head_dim]
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        def rotate(x):
            return x * cos + x.roll(self.head_dim // 2, dims=-1) * sin

        q, k = rotate(self.q_norm(heads(self.q(x)))), rotate(self.k_norm(heads(self.k(x))))
        v = heads(self.v(x))
        if text is not None:
            k = torch.cat([k, self.k_norm(heads(self.text_k(text)))], dim=2)
            v = torch.cat([v, heads(self.text_v(text))], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        return self.out(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Attention, then the MLP; both modulated and gated."""

    def __init__(self, model: dict, emb_width: int, text_keys: bool):
        super().__init__()
        width = model["width"]
        self.modulation = Modulation(6, emb_width, width)
        self.norm1, self.norm2 = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.attention = Attention(width, model["head_dim"], text_keys)
        self.mlp = MLP(width, round(width * model["mlp_ratio"]))

    def forward(self, h: Tensor, emb: Tensor, *tokens) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(emb)
        h = h + gate1 * self.attention(self.norm1(h) * (1 + scale1) + shift1, *tokens)
        return h + gate2 * self.mlp(self.norm2(h) * (1 + scale2) + shift2)


class PatchEmbedding(nn.Module):
    """Patches [B, values, h, w] -> tokens [B, h * w, width]."""

    def __init__(self, model: dict):
        super().__init__()
        values = (6 if model["low_res"] else 3) * model["patch_size"] ** 2
        narrow, self.absolute = model["bottleneck"], not model["low_res"]
        self.squeeze = nn.Linear(values, narrow, bias=False) if narrow else nn.Identity()
        self.out = nn.Linear(narrow or values, model["width"])

    def forward(self, patches: Tensor) -> Tensor:
        h = self.out(self.squeeze(patches.flatten(2).transpose(1, 2)))
        if self.absolute:
            grid = rows_and_columns(*patches.shape[2:])
            h = h + torch.cat([sinusoids(p, h.shape[-1] // 2) for p in grid], dim=-1)
        return h


class TextEmbedding(nn.Module):
    """Text [B, T, emb_width] and its mask -> tokens [B, S, width], one for `patch`, and theirs."""

    def __init__(self, emb_width: int, width: int, norm: bool, patch: int):
        super().__init__()
        self.norm = nn.LayerNorm(emb_width, eps=1e-6) if norm else nn.Identity()
        self.patch = patch
        self.out = nn.Linear(patch * emb_width, width)

    def forward(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        text = self.norm(text)
        if self.patch > 1:
            pad = -text.shape[1] % self.patch
            text = F.pad(text * mask[..., None], (0, 0, 0, pad))
            text = text.unflatten(1, (-1, self.patch)).flatten(2)
            mask = F.pad(mask, (0, pad)).unflatten(1, (-1, self.patch)).any(-1)
        return self.out(text), mask


class Head(nn.Module):
    """Norm, modulation and a projection to the values of a patch."""

    def __init__(self, model: dict, emb_width: int):
        super().__init__()
        self.modulation = Modulation(2, emb_width, model["width"])
        self.norm = nn.RMSNorm(model["width"], eps=1e-6)
        self.out = nn.Linear(model["width"], 3 * model["patch_size"] ** 2)

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        shift, scale = self.modulation(emb)
        return self.out(self.norm(h) * (1 + scale) + shift)


class Transformer(nn.Module):
    """The network of a config.json, as a dict."""

    def __init__(self, config: dict):
        super().__init__()
        self.model, sequence = config["model"], config["text"]["sequence"]
        width = self.model["width"]
        emb_width = self.model["cond_width"] or width
        text_keys = sequence != "none" and self.model["text_tokens"] == "keys"
        head_dim = self.model["head_dim"]
        self.conditioner = Conditioner(config, TIME_DIM, emb_width, head_dim)
        self.patches = PatchEmbedding(self.model)
        normed = sequence == "cross_attention_layernorm"
        embed = functools.partial(TextEmbedding, emb_width, width, normed)
        self.text = embed(self.model["text_patch_size"]) if sequence != "none" else None
        blocks = (Block(self.model, emb_width, text_keys) for _ in range(self.model["depth"]))
        self.blocks = nn.ModuleList(blocks)
        self.head = Head(self.model, emb_width)

    def forward(
        self,
        z: Tensor,
        log_snr: Tensor,
        text: Tensor,
        text_mask: Tensor,
        low_res: Tensor | None = None,
        aug_level: Tensor | None = None,
    ) -> Tensor:
        """Returns what config["diffusion"]["prediction"] names, [B, 3, H, W].

        Args:
          z: the noisy image, [B, 3, H, W].
          log_snr: its log-SNR, [B].
          text, text_mask: embeddings of the prompt, [B, T, D], and bool [B, T].
          low_res, aug_level: for super-resolution, [B, 3, h, w] in [-1, 1] with noise, and [B].
        """
        patches = fold(with_low_res(z, low_res), self.model["patch_size"])
        emb, tokens = self.conditioner(log_snr, text, text_mask, aug_level)
        h = self.patches(patches)
        num_patches = h.shape[1]
        mask = torch.ones(h.shape[:2], dtype=torch.bool)
        cos, sin = rotations(*patches.shape[2:], self.model["head_dim"])
        if self.text is not None:
            tokens, text_mask = self.text(tokens, text_mask)
            mask = torch.cat([mask, text_mask], dim=1)
            if self.model["text_tokens"] == "sequence":  # tokens without a rotation
                h = torch.cat([h, tokens], dim=1)
                none = torch.ones(tokens.shape[1], cos.shape[1])
                cos, sin, tokens = torch.cat([cos, none]), torch.cat([sin, 0 * none]), None
        else:
            tokens = None
        for block in self.blocks:
            h = block(h, emb, (cos, sin), tokens, mask)
        out = self.head(h[:, :num_patches], emb)
        out = out.transpose(1, 2).unflatten(2, patches.shape[2:])
        out = unfold(out, self.model["patch_size"])
        return add_low_res(out, low_res, aug_level) if self.model["low_res_skip"] else out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    show(load(folder, Transformer), json.loads((folder / "config.json").read_text()))
