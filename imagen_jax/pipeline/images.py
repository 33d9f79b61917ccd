"""Images to edit or enlarge: read from files or memory, and fitted to the model's size."""

from __future__ import annotations

import os
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

from imagen_jax.common import cli
from imagen_jax.common.pictures import FORMATS, MOST_PIXELS, to_rgb
from imagen_jax.pipeline.settings import ImageLike, SettingError, Settings


def read_inputs(settings: Settings, low_res: int, size: int) -> dict[str, np.ndarray]:
    """Reads settings.image and settings.mask as the arrays that all samples start from.

    Args:
      low_res: side of the images that the first stage enlarges, pixels; 0 for a base model.
      size: side of the images that the last stage samples, pixels.

    Returns:
      low_res uint8 [low_res, low_res, 3] if the first stage enlarges; otherwise image uint8
      [size, size, 3] and, with a mask, mask bool [size, size, 1]. Empty without an image.

    Raises:
      SettingError: a file cannot be read, image and mask do not match, or nothing would change.
    """
    if settings.image is None:
        return {}
    label, image = _open("image", settings.image)
    if low_res:
        return {"low_res": _pixels(label, image, low_res)}
    inputs = {"image": _pixels(label, image, size)}
    if settings.mask is not None:
        mask_label, mask = _open("mask", settings.mask)
        if not _same_shape(image.size, mask.size):
            (w, h), (mask_w, mask_h) = image.size, mask.size
            raise SettingError(
                f"{mask_label} is {mask_w}x{mask_h}, but the image is {w}x{h}; "
                "the mask must have the image's aspect ratio"
            )
        inputs["mask"] = _mask_pixels(mask_label, mask, size)
    elif settings.strength in (None, 1):
        raise SettingError(f"{label} needs a strength below 1 (try 0.6) or a mask")
    return inputs


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    """Returns whether two sizes have the same aspect ratio, up to rounding to whole pixels."""
    return abs(a[0] * b[1] - b[0] * a[1]) <= max(*a, *b)


def _open(name: str, source: ImageLike) -> tuple[str, Image.Image]:
    """Returns the label of an image for messages, and the image, turned upright."""
    if isinstance(source, np.ndarray):
        source = _from_array(name, source)
    label = name if isinstance(source, Image.Image) else f"{name}={source}"
    try:
        image = source if isinstance(source, Image.Image) else _from_file(label, source)
        upright = ImageOps.exif_transpose(image)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except SettingError:
        raise
    except FileNotFoundError as e:
        raise SettingError(f"{label}: no such file") from e
    except Exception as e:  # decoders raise anything on a broken file
        raise SettingError(f"{label} is not a readable image ({type(e).__name__})") from e
    if turned:
        cli.log.info("%s: turned upright as its EXIF orientation says", label)
    return label, upright


def _from_file(label: str, path: str | os.PathLike) -> Image.Image:
    if os.path.exists(path) and not os.path.isfile(path):
        raise SettingError(f"{label} is not a file")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below is lower
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
            if width * height > MOST_PIXELS:
                allowed = f"allowed: {MOST_PIXELS:,} pixels"
                raise SettingError(f"{label} is {width}x{height} pixels; {allowed}")
            image.load()
    return image


def _from_array(name: str, array: np.ndarray) -> Image.Image:
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    shaped = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype != np.uint8 or not shaped or not array.size:
        raise SettingError(
            f"{name} is an array {array.dtype} {list(array.shape)}; allowed: uint8 [H, W], "
            "[H, W, 3] or [H, W, 4], or bool [H, W]"
        )
    return Image.fromarray(array)


def _pixels(label: str, image: Image.Image, size: int) -> np.ndarray:
    """Returns an image as uint8 [size, size, 3]; area filter to shrink, bicubic to enlarge."""
    method = Image.Resampling.BOX if min(image.size) > size else Image.Resampling.BICUBIC
    if image.mode != "RGB":
        cli.log.info("%s: converted from mode %s to RGB", label, image.mode)
    return np.asarray(_fit(label, to_rgb(image), size, method))


def _mask_pixels(label: str, mask: Image.Image, size: int) -> np.ndarray:
    """Returns a mask as bool [size, size, 1], True where white; transparent pixels are black."""
    gray = to_rgb(mask, "black").convert("L")
    pixels = np.asarray(_fit(label, gray, size, Image.Resampling.NEAREST))[..., None] > 127
    if not pixels.any():
        raise SettingError(f"{label} is black everywhere; white marks what to repaint")
    return pixels


def _fit(label: str, image: Image.Image, size: int, method: Image.Resampling) -> Image.Image:
    """Crops to the center square and resizes it to size x size."""
    (width, height), side = image.size, min(image.size)
    if width != height:
        cli.log.info("%s: %dx%d cropped to its center %dx%d", label, width, height, side, side)
        left, top = (width - side) // 2, (height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if side != size:
        cli.log.info("%s: resized from %dx%d to %dx%d", label, side, side, size, size)
        image = image.resize((size, size), method)
    return image
