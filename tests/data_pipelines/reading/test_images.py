"""Decoding: area filter, crops, scaled JPEGs within a tolerance, and what is refused."""

import io

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from skimage import data as photos

from data_pipelines.reading import images
from data_pipelines.records.source import Bad


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


@pytest.mark.parametrize(("side", "size"), [(64, 64), (64, 16), (100, 64), (65, 64)])
def test_shrinking_is_tensorflows_area_filter(side, size):
    image = noise(side, side, 3)
    expected = tf.image.resize(image, (size, size), method="area").numpy()
    found = images.decode(encoded(image), size).astype(np.float32)
    assert np.abs(found - expected).max() <= 0.5 + 1e-4


def test_the_center_square_is_taken_unless_a_place_is_given():
    image = noise(40, 60, 3)
    whole = {"size": 40}
    np.testing.assert_array_equal(images.decode(encoded(image), **whole), image[:, 10:50])
    left = images.decode(encoded(image), **whole, place=(0.0, 0.0))
    np.testing.assert_array_equal(left, image[:, :40])
    small = images.decode(encoded(image), 20, scale=0.5, place=(1.0, 1.0))
    np.testing.assert_array_equal(small, image[20:, 40:])
    # Nothing is enlarged: the square is never below the size.
    assert images.decode(encoded(image), 30, scale=0.1, place=(0.5, 0.5)).shape == (30, 30, 3)


@pytest.mark.parametrize("photo", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("size", [32, 64])
def test_scaled_decoding_gives_nearly_the_same_picture(photo, size):
    image = Image.fromarray(getattr(photos, photo)())
    # In units of 16, so that the center square begins at a whole pixel at any scale.
    image = image.crop((0, 0, *(n // 16 * 16 for n in image.size)))
    data = encoded(image, "JPEG", quality=90)
    full = Image.open(io.BytesIO(data)).convert("RGB")
    expected = images.decode(encoded(full), size).astype(int)
    error = np.abs(images.decode(data, size) - expected)
    assert 0 < error.mean() < 1.5 and np.percentile(error, 99) <= 8


def test_formats_are_turned_upright_and_made_rgb():
    image = Image.fromarray(noise(32, 48, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(image, "PNG", exif=exif)
    expected = np.asarray(image.transpose(Image.Transpose.ROTATE_270))
    np.testing.assert_array_equal(images.decode_whole(turned), expected)
    clear = encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0)))
    assert (images.decode(clear, 8) == 255).all()
    for kind, mode in (("JPEG", "CMYK"), ("JPEG", "L"), ("WEBP", "RGB"), ("GIF", "P")):
        assert images.decode(encoded(image.convert(mode), kind), 16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "image cannot be decoded: not an image"),
        (b"not an image", "image cannot be decoded: not an image"),
        (encoded(noise(64, 64, 3), "JPEG")[:600], "image cannot be decoded"),
        (encoded(noise(64, 64, 3))[:-3000], "image cannot be decoded"),
        (encoded(noise(8, 64, 3)), "image too small: 64x8, but config.model.image_size or"),
    ],
)
def test_a_bad_image_has_a_reason(data, words):
    with pytest.raises(Bad, match=words) as error:
        images.decode(data, 16)
    assert "\n" not in str(error.value)
