"""The U-Net in PyTorch, with exported weights; model.name is "unet".

python -m imagen_jax.export --workdir=runs/demo_unet --out=exports/unet
python examples/torch_unet.py exports/unet

network = load("exports/unet", UNet)
output = network(z, log_snr, text, text_mask)
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch_layers import Conditioner, add_low_res, attend, fold, load, show, unfold, with_low_res

RESAMPLE = {
    None: lambda x: x,
    "down": lambda x: F.avg_pool2d(x, 2),
    "up": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
}


class Spec(NamedTuple):
    """Channels and wiring of one block."""

    inputs: int
    outputs: int
    skip: int = 0
    resample: str | None = None
    attends: bool = False
    saves_skip: bool = False


def plan(model: dict) -> Iterator[Spec]:
    """Yields the blocks of the encoder, the middle and the decoder."""
    extra, count, width = model["decoder_extra_block"], model["num_res_blocks"], model["embed_dim"]
    finest = model["image_size"] // model["patch_size"]
    levels = [
        (level, width * mult, finest >> level in model["attention_resolutions"])
        for level, mult in enumerate(model["channel_mult"])
    ]
    skips = [width] * extra
    for level, out, attends in levels:
        if level > 0:
            yield Spec(width, width, resample="down", saves_skip=extra)
            skips += [width] * extra
        for _ in range(count):
            yield Spec(width, out, attends=attends, saves_skip=True)
            skips.append(out)
            width = out
    yield Spec(width, width, attends=levels[-1][2])
    yield Spec(width, width)
    for level, out, attends in reversed(levels):
        for _ in range(count + extra):
            yield Spec(width, out, skip=skips.pop(), attends=attends)
            width = out
        if level > 0:
            yield Spec(width, width, resample="up")


class GroupNorm(nn.GroupNorm):
    """Up to 32 groups of 4 channels or more."""

    def __init__(self, channels: int):
        most = min(32, max(1, channels // 4))
        super().__init__(max(g for g in range(1, most + 1) if channels % g == 0), channels)


class ResBlock(nn.Module):
    """Norm, swish, resample, convolution, norm with the embedding, swish, convolution."""

    def __init__(self, inputs: int, spec: Spec, emb_width: int, scale_shift: bool):
        super().__init__()
        out = spec.outputs
        self.resample, self.scale_shift = RESAMPLE[spec.resample], scale_shift
        self.norm1, self.norm2 = GroupNorm(inputs), GroupNorm(out)
        self.conv1 = nn.Conv2d(inputs, out, 3, padding=1)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        self.emb = nn.Linear(emb_width, (2 if scale_shift else 1) * out)
        self.shortcut = nn.Identity() if inputs == out else nn.Linear(inputs, out)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        emb = self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + emb)
        shortcut = self.shortcut(self.resample(x).movedim(1, -1)).movedim(-1, 1)
        return shortcut + self.conv2(F.silu(h))


class Attention(nn.Module):
    """Residual attention from pixels to pixels and text, with one softmax over the keys of both."""

    def __init__(self, channels: int, head_dim: int, text_width: int, text_norm: bool):
        super().__init__()
        self.head_dim, self.reads_text = head_dim, text_width > 0
        self.norm = GroupNorm(channels)
        self.q, self.k, self.v, self.out = (nn.Linear(channels, channels) for _ in range(4))
        if self.reads_text:
            self.text_norm = nn.LayerNorm(text_width, eps=1e-6) if text_norm else nn.Identity()
            self.text_k, self.text_v = (nn.Linear(text_width, channels) for _ in range(2))

    def forward(self, x: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        h = self.norm(x).flatten(2).transpose(1, 2)
        k, v, mask = self.k(h), self.v(h), None
        if self.reads_text:
            text = self.text_norm(text)
            k, v = torch.cat([k, self.text_k(text)], 1), torch.cat([v, self.text_v(text)], 1)
            mask = F.pad(text_mask, (h.shape[1], 0), value=True)
        out = self.out(attend(self.q(h), k, v, mask, self.head_dim))
        return x + out.transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    """A residual block and its attention, if planned."""

    def __init__(self, spec: Spec, config: dict, emb_width: int):
        super().__init__()
        model, sequence = config["model"], config["text"]["sequence"]
        inputs, scale_shift = spec.inputs + spec.skip, model["use_scale_shift_norm"]
        self.res = ResBlock(inputs, spec, emb_width, scale_shift)
        text_width = 0 if sequence == "none" else emb_width
        normed = sequence == "cross_attention_layernorm"
        head_dim = model["per_head_channels"]
        attention = (spec.outputs, head_dim, text_width, normed)
        self.attention = Attention(*attention) if spec.attends else None

    def forward(self, h: Tensor, emb: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        h = self.res(h, emb)
        return h if self.attention is None else self.attention(h, text, text_mask)


class NormHead(nn.Module):
    """Norm, swish and a convolution."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm, self.conv = GroupNorm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, h: Tensor) -> Tensor:
        return self.conv(F.silu(self.norm(h)))


class UNet(nn.Module):
    """The network of a config.json, as a dict."""

    def __init__(self, config: dict):
        super().__init__()
        model = config["model"]
        self.patch, self.specs = model["patch_size"], list(plan(model))
        self.extra = model["decoder_extra_block"]
        width = model["embed_dim"]
        emb_width = model["cond_width"] or 4 * width
        self.conditioner = Conditioner(config, width, emb_width, model["per_head_channels"])
        pixels = 3 * self.patch**2
        inputs = (2 if model["low_res"] else 1) * pixels
        self.adds_low_res = model["low_res_skip"]
        self.stem = nn.Conv2d(inputs, width, 3, padding=1)
        self.blocks = nn.ModuleList(Block(spec, config, emb_width) for spec in self.specs)
        last = self.specs[-1].outputs
        eps = config["diffusion"]["prediction"] == "eps"
        self.head = NormHead(last, pixels) if eps else nn.Conv2d(last, pixels, 3, padding=1)

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
        emb, text = self.conditioner(log_snr, text, text_mask, aug_level)
        h = self.stem(fold(with_low_res(z, low_res), self.patch))
        skips = [h] if self.extra else []
        for spec, block in zip(self.specs, self.blocks, strict=True):
            if spec.skip:
                h = torch.cat([h, skips.pop()], dim=1)
            h = block(h, emb, text, text_mask)
            if spec.saves_skip:
                skips.append(h)
        out = unfold(self.head(h), self.patch)
        return add_low_res(out, low_res, aug_level) if self.adds_low_res else out


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    show(load(folder, UNet), json.loads((folder / "config.json").read_text()))
