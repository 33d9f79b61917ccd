"""Every image becomes upright 8-bit RGB with its aspect ratio, or a reason to leave it out."""

import importlib.util
import io
import struct
import zlib

import numpy as np
import pytest
from making import encoded, picture
from PIL import Image

from data_pipelines.common import Skip
from data_pipelines.ingestion import images

RED, BLUE = (255, 0, 0), (0, 0, 255)


def limits(**changes):
    values = {"resolution": 16, "min_size": 8, "max_aspect_ratio": 3.0, "max_pixels": 10**6}
    return images.Limits(**{**values, "keep_animation": False, **changes})


def convert(data, **changes):
    found = images.convert("name", data, limits(**changes))
    if isinstance(found, Skip):
        return found
    stored = Image.open(io.BytesIO(found.data))
    assert stored.mode == "RGB" and stored.format in ("JPEG", "PNG")
    pixels = np.asarray(stored).astype(int)
    assert np.abs(pixels - np.asarray(found.image)).max() <= 40  # JPEG
    return found, pixels


def close(pixels, color, tolerance=0):
    assert np.abs(pixels - color).max() <= tolerance


def test_rotation_is_applied_and_the_aspect_ratio_kept():
    halves = Image.new("RGB", (80, 64), RED)
    halves.paste(BLUE, (0, 0, 40, 64))  # on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # rotates clockwise: blue is at the top
    found, pixels = convert(encoded(halves, "JPEG", exif=exif, quality=95))
    assert pixels.shape == (20, 16, 3) and found.size == (64, 80)
    assert found.changes == ["turned upright"]
    close(pixels[:8], BLUE, 12)
    close(pixels[12:], RED, 12)


@pytest.mark.parametrize(
    ("image", "format", "color", "change"),
    [
        (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG", 255, "transparency on white"),
        (Image.new("RGBA", (16, 16), (255, 0, 0, 128)), "WEBP", (255, 127, 127), "transparency"),
        (Image.new("L", (16, 16), 100), "PNG", 100, "gray to RGB"),
        (Image.new("I;16", (16, 16), 100 * 257), "PNG", 100, "16 bits to 8"),
        (Image.new("I;16", (16, 16), 100 * 257), "TIFF", 100, "16 bits to 8"),
        (Image.new("RGB", (16, 16), RED).convert("CMYK"), "JPEG", RED, "CMYK to RGB"),
        (Image.new("RGB", (16, 16), RED).convert("P"), "GIF", RED, "P to RGB"),
        (Image.new("RGB", (16, 16), RED), "AVIF", RED, None),
        (Image.new("RGB", (16, 16), RED), "TIFF", RED, None),
    ],
)
def test_modes_are_converted_and_counted(image, format, color, change):
    options = {"quality": 100} if format in ("JPEG", "AVIF", "WEBP") else {}
    found, pixels = convert(encoded(image, format, **options))
    close(pixels, color, 4 if options else 0)
    assert [c.startswith(change) for c in found.changes] == [True] if change else not found.changes


def test_an_image_that_fits_keeps_its_bytes():
    for format in ("JPEG", "PNG"):
        data = encoded(picture(0, (16, 30)), format)
        assert convert(data)[0].data == data
        assert convert(data, resolution=8)[0].data != data
    assert convert(encoded(picture(0), "WEBP"))[0].data[:3] == b"\xff\xd8\xff"  # stays lossy
    assert convert(encoded(picture(0), "BMP"))[0].data[:4] == b"\x89PNG"


def test_shrinking_averages_pixels():
    checks = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.abs(convert(encoded(checks.convert("RGB")))[1] - 127).max() <= 2


def test_a_large_jpeg_decoded_at_a_fraction_looks_the_same():
    data = encoded(picture(3, (1000, 800)), "JPEG", quality=95)
    drafted = convert(data)[1]
    whole = convert(encoded(Image.open(io.BytesIO(data))))[1]
    assert drafted.shape == whole.shape == (16, 20, 3) and np.abs(drafted - whole).max() <= 12


def noisy(size=(90, 90)):
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (*size, 3), np.uint8))


def animation(format):
    frames = [picture(i) for i in range(3)]
    return encoded(frames[0], format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("data", "reason", "changes"),
    [
        (b"", "unreadable image", {}),
        (b"\xff\xd8\xff nothing", "unreadable image", {}),
        (encoded(noisy())[:5000], "unreadable image", {}),
        (encoded(noisy(), "JPEG")[:2000], "unreadable image", {}),
        (encoded(picture(0, (90, 7))), "smaller than --min_size=8", {}),
        (encoded(picture(0, (90, 15))), "smaller than --resolution=16", {"min_size": 16}),
        (encoded(picture(0, (62, 20))), "beyond --max_aspect_ratio=3", {}),
        (encoded(picture(0, (30, 40))), "more than --max_pixels=1000", {"max_pixels": 1000}),
        (animation("GIF"), "animation or several pages", {}),
        (animation("WEBP"), "animation or several pages", {}),
        (animation("TIFF"), "animation or several pages", {}),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC without pillow-heif", {}),
    ],
)
def test_reasons_to_leave_an_image_out(data, reason, changes):
    if "HEIC" in reason and importlib.util.find_spec("pillow_heif"):
        reason = "unreadable image"
    assert convert(data, **changes).reason == reason


def test_heic_is_read_with_pillow_heif():
    pillow_heif = pytest.importorskip("pillow_heif")
    pillow_heif.register_heif_opener()
    found, pixels = convert(encoded(Image.new("RGB", (64, 64), RED), "HEIF", quality=100))
    close(pixels, RED, 6)
    assert found.format == "HEIF" and found.data[:3] == b"\xff\xd8\xff"


def test_switched_off_limits_keep_the_image():
    found, pixels = convert(encoded(picture(0, (90, 20))), max_aspect_ratio=0)
    assert pixels.shape == (16, 72, 3)
    found, _ = convert(animation("GIF"), keep_animation=True)
    assert "first frame of several" in found.changes
    found, pixels = convert(encoded(picture(0, (9, 10))))
    assert min(pixels.shape[:2]) == 16 and found.changes == ["enlarged to --resolution=16"]


def test_a_bomb_is_refused_before_it_is_decoded():
    bomb = bytearray(encoded(picture(0)))
    bomb[16:24] = struct.pack(">II", 60_000, 60_000)  # the size in the header
    bomb[29:33] = struct.pack(">I", zlib.crc32(bomb[12:29]))
    refused = convert(bytes(bomb), max_pixels=2**28)
    assert (refused.reason, refused.detail) == ("more than --max_pixels=268435456", "60000x60000")
    assert images.preview(bytes(bomb)) is None
