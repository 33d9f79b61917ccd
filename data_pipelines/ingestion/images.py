"""Decodes an image, converts it to upright 8-bit RGB, resizes it and encodes it."""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, ImageOps

from data_pipelines.common import Skip
from imagen_jax.common.pictures import to_rgb

_LOSSY = ("JPEG", "MPO", "WEBP", "AVIF", "HEIF")
_MPO = "MPO"  # a JPEG with previews or a second view, as phones write it
_ORIENTATION = 0x0112


class Limits(NamedTuple):
    """What is refused before or while decoding; see the flags of the same names."""

    resolution: int
    min_size: int
    max_aspect_ratio: float
    max_pixels: int
    keep_animation: bool


class Converted(NamedTuple):
    """An image as it is stored.

    Attributes:
      data: JPEG or PNG.
      image: the same, RGB.
      size: width and height of the original, upright.
      format: of the original.
      changes: what was converted, to count.
    """

    data: bytes
    image: Image.Image
    size: tuple[int, int]
    format: str
    changes: list[str]


@functools.cache
def _read_heic() -> None:
    """Lets Pillow read HEIC if pillow-heif is installed."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


def convert(name: str, data: bytes, limits: Limits) -> Converted | Skip:
    """Converts an image, or says why it cannot be used.

    The shorter side becomes `resolution`; the aspect ratio is kept. An image that needs no change
    keeps its bytes.
    """
    _read_heic()
    Image.MAX_IMAGE_PIXELS = None  # max_pixels replaces Pillow's limit, which only warns at first
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > limits.max_pixels:  # before Pillow decodes for its EXIF
                shown = f"{image.width}x{image.height}"
                return Skip(name, f"more than --max_pixels={limits.max_pixels}", shown)
            size = _upright_size(image)
            if refused := _refuse(name, image, size, limits):
                return refused
            format = image.format or ""
            changes = list(_changes(image, size, limits))
            fits = min(size) == limits.resolution and image.mode == "RGB" and not changes
            plain = fits and format in ("JPEG", "PNG")
            if format == "JPEG":
                # Decodes at a fraction of the size, but never below twice the size that is needed.
                draft = 2 * limits.resolution
                image.draft(None, (draft, draft))
            upright = ImageOps.exif_transpose(image)
            rgb = _resize(to_rgb(upright), size, limits.resolution)
    except Exception as e:  # a broken file makes decoders raise anything
        return _unreadable(name, data, e)
    stored = data if plain else _encode(rgb, lossy=format in _LOSSY)
    return Converted(stored, rgb, size, format, changes)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return (image.height, image.width) if turned else image.size


def _refuse(name: str, image: Image.Image, size: tuple[int, int], limits: Limits) -> Skip | None:
    (low, high), shown = sorted(size), f"{size[0]}x{size[1]}"
    if low < limits.min_size:
        flag = "resolution" if limits.min_size == limits.resolution else "min_size"
        return Skip(name, f"smaller than --{flag}={limits.min_size}", shown)
    if limits.max_aspect_ratio and high > limits.max_aspect_ratio * low:
        return Skip(name, f"beyond --max_aspect_ratio={limits.max_aspect_ratio:g}", shown)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != _MPO and not limits.keep_animation:
        return Skip(name, "animation or several pages", f"{frames} frames")
    return None


def _changes(image: Image.Image, size: tuple[int, int], limits: Limits) -> Iterator[str]:
    """Yields the conversions that an image needs, except shrinking and encoding."""
    if image.getexif().get(_ORIENTATION, 1) != 1:
        yield "turned upright"
    if image.mode == "CMYK":
        yield "CMYK to RGB"
    elif image.mode.startswith(("I", "F")):
        yield "16 bits to 8"
    elif image.has_transparency_data:
        yield "transparency on white"
    elif image.mode in ("L", "1", "LA"):
        yield "gray to RGB"
    elif image.mode != "RGB":
        yield f"{image.mode} to RGB"
    if getattr(image, "n_frames", 1) > 1 and image.format != _MPO:
        yield "first frame of several"
    if min(size) < limits.resolution:
        yield f"enlarged to --resolution={limits.resolution}"


def _resize(image: Image.Image, size: tuple[int, int], resolution: int) -> Image.Image:
    """Makes the shorter side `resolution`; antialiased when it shrinks."""
    low = min(size)
    if low == resolution:
        return image
    target = tuple(resolution if side == low else round(side * resolution / low) for side in size)
    return image.resize(target, Image.Resampling.BICUBIC)


def _encode(image: Image.Image, lossy: bool) -> bytes:
    """Encodes as JPEG what was lossy before: a third of a PNG's bytes, and faster to decode."""
    buffer = io.BytesIO()
    if lossy:
        image.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def _unreadable(name: str, data: bytes, error: Exception) -> Skip:
    if data[4:12] in (b"ftypheic", b"ftypheix", b"ftypmif1") and "HEIF" not in Image.OPEN:
        return Skip(name, "HEIC without pillow-heif", "pip install pillow-heif")
    return Skip(name, "unreadable image", f"{type(error).__name__}: {str(error)[:200]}")


def thumbnail(image: Image.Image, side: int = 96) -> bytes:
    """Returns a small JPEG for the data card, on a gray square."""
    sheet = Image.new("RGB", (side, side), "#ddd")
    small = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.BICUBIC)
    sheet.paste(small, ((side - small.width) // 2, (side - small.height) // 2))
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def preview(data: bytes) -> bytes | None:
    """Returns a thumbnail of any image of a sane size, None if it cannot be decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > 2**26:
                return None
            image.draft("RGB", (192, 192))
            return thumbnail(to_rgb(image))
    except Exception:  # a broken file makes decoders raise anything
        return None
