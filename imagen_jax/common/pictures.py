"""Captioned sample grids, loss curves, and conversion of images to RGB."""

from __future__ import annotations

import contextlib
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from imagen_jax.common.files import replacing

MOST_ON_A_SHEET = 64
# What an image may be: formats that run no other program, and pixels that fit in memory.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000")
MOST_PIXELS = 2**26


def grid(images: np.ndarray, captions: list[str], columns: int = 4, side: int = 128) -> Image.Image:
    """Arranges images on a sheet, each above its caption.

    Args:
      images: uint8 [N, H, W, 3].
      captions: N strings, wrapped to the width of a cell.
      side: height of an image on the sheet. Enlarging does not smooth, so real pixels show.
    """
    font = ImageFont.load_default(11)
    pad, line = 8, 14
    width = side * images.shape[2] // images.shape[1]
    wrapped = [textwrap.wrap(c, max(10, width // 6))[:6] for c in captions]
    height = side + pad + line * max((len(w) for w in wrapped), default=0)
    rows = -(-len(images) // columns)
    size = columns * (width + pad) + pad, rows * (height + pad) + pad
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        x, y = pad + (i % columns) * (width + pad), pad + (i // columns) * (height + pad)
        method = Image.Resampling.NEAREST if image.shape[0] <= side else Image.Resampling.LANCZOS
        sheet.paste(Image.fromarray(image).resize((width, side), method), (x, y))
        for j, text in enumerate(lines):
            draw.text((x, y + side + 2 + j * line), text, fill="black", font=font)
    return sheet


def save(image: Image.Image, path: Path, info: PngInfo | None = None) -> None:
    """Writes a PNG atomically, with optional text chunks; creates the folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def loss_curve(
    xs: list[float],
    losses: list[float],
    path: Path,
    eval_points=(),
    label: str = "loss",
    xlabel: str = "step",
) -> None:
    """Writes a loss curve to `path` as a PNG that stays legible on a phone.

    Args:
      xs: the step or the time of each loss.
      eval_points: (x, held-out loss) pairs, drawn over the curve.
      label: the loss axis, such as Config.loss_label.
    """
    with chart(path, (5, 3), xlabel=xlabel, ylabel=label) as axes:
        axes.plot(xs, losses, lw=1, label="training")
        if eval_points:
            axes.plot(*zip(*eval_points, strict=True), "o-", ms=4, label="held out, EMA weights")


@contextlib.contextmanager
def chart(path: Path, inches: tuple[float, float] = (7, 3.5), **settings: Any) -> Iterator[Any]:
    """Yields axes for labeled lines; then applies `settings` and writes a PNG.

    The y axis is logarithmic unless `settings` have another yscale.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=inches, layout="constrained")
    yield axes
    axes.set(**{"yscale": "log", **settings})
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Converts any mode to RGB: transparency shows the background, 16 bits become 8."""
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")
