"""Decodes an image and crops it as the config section `data` says."""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator

import numpy as np
import tensorflow as tf
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from data_pipelines.records.source import Bad
from imagen_jax.common.errors import first_line
from imagen_jax.common.pictures import to_rgb

# JPEGs are decoded at 1/2, 1/4 or 1/8 of their size if that leaves so many pixels a side for each
# pixel of the result. This takes half the time. On photos, the mean difference is below 1.5 of 255;
# the square may be a quarter of a pixel of the result away.
_OVERSAMPLING = 2


def decode(
    data: bytes, size: int, scale: float = 1.0, place: tuple[float, float] | None = None
) -> np.ndarray:
    """Decodes an image, crops a square, and shrinks it by an area filter, which antialiases.

    Args:
      data: a file in any format that Pillow reads; turned upright, on white where transparent.
      scale: side of the square as a share of the shorter side; at least `size` pixels are taken.
      place: where the square is, from (0, 0), top left, to (1, 1); None is the center.

    Returns:
      uint8 [size, size, 3].

    Raises:
      Bad: it cannot be decoded, or is smaller than `size`.
    """
    with _decoding(data) as image:
        short = min(image.size)
        if short < size:
            need = f"config.model.image_size or config.data.image_size is {size}"
            raise Bad("image too small", f"{image.width}x{image.height}, but {need}")
        scale = max(scale, size / short)
        least = _OVERSAMPLING * size / (short * scale)
        if image.format == "JPEG" and least < 1:
            image.draft(None, tuple(math.ceil(n * least) for n in image.size))
        return _shrink(_upright(image), size, scale, place)


def decode_whole(data: bytes) -> np.ndarray:
    """Decodes an image without changing its size: uint8 [H, W, 3]. Raises Bad, as `decode`."""
    with _decoding(data) as image:
        return np.asarray(_upright(image))


@contextlib.contextmanager
def _decoding(data: bytes) -> Iterator[Image.Image]:
    try:
        yield Image.open(io.BytesIO(data))
    except UnidentifiedImageError as e:
        raise Bad("image cannot be decoded", "not an image of a known format") from e
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise Bad("image cannot be decoded", first_line(e)) from e


def _upright(image: Image.Image) -> Image.Image:
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode != "RGB" or image.has_transparency_data:
        image = to_rgb(image)
    return image


def _shrink(
    image: Image.Image, size: int, scale: float, place: tuple[float, float] | None
) -> np.ndarray:
    side = max(size, round(min(image.size) * scale))
    free = np.array([image.height - side, image.width - side])
    top, left = (free // 2 if place is None else np.round(free * place).astype(int)).tolist()
    box = (left, top, left + side, top + side)
    if box == (0, 0, size, size) == (0, 0, *image.size):
        return np.asarray(image)
    if side % size == 0:  # the mean of whole blocks
        return np.asarray(image.reduce(side // size, box))
    # Pillow's box filter does not weight the pixels at the edges of a box.
    pixels = np.asarray(image)[None, top : top + side, left : left + side]
    small = tf.raw_ops.ResizeArea(images=pixels, size=(size, size)).numpy()[0]
    return np.clip(np.round(small), 0, 255).astype(np.uint8)
