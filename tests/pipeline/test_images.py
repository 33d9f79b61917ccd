"""Images of any size and mode become arrays at the model's size; the log says what changed."""

import logging
import os

import numpy as np
import pytest
from PIL import Image

from imagen_jax.pipeline.images import read_inputs
from imagen_jax.pipeline.settings import SettingError, Settings


@pytest.fixture
def log(caplog, monkeypatch):
    """The log messages, even if a command line keeps the logger from propagating."""
    monkeypatch.setattr(logging.getLogger("imagen_jax"), "propagate", True)
    caplog.set_level(logging.INFO, "imagen_jax")
    return lambda: [r.getMessage() for r in caplog.records]


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def read(image, mask=None, size=8):
    strength = 0.5 if mask is None else None
    inputs = read_inputs(Settings(image=image, mask=mask, strength=strength), 0, size)
    return inputs["image"] if mask is None else inputs["mask"]


def test_an_image_that_fits_is_taken_unchanged(tmp_path, log):
    pixels = noise(8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    file = tmp_path / "image.png"
    for source in (file, str(file), Image.open(file), pixels):
        np.testing.assert_array_equal(read(source), pixels)
    np.testing.assert_array_equal(read_inputs(Settings(image=file), 8, 64)["low_res"], pixels)
    assert read_inputs(Settings(), 0, 8) == {}
    assert not log()


def test_the_center_square_is_shrunk_by_an_area_filter(tmp_path, log):
    pixels = noise(16, 20, 3)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    center = pixels[:, 2:18].astype(float).reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(read(tmp_path / "wide.png") - center).max() <= 1
    name = f"image={tmp_path / 'wide.png'}"
    assert log() == [
        f"{name}: 20x16 cropped to its center 16x16",
        f"{name}: resized from 16x16 to 8x8",
    ]
    assert read(noise(6, 4, 3)).shape == (8, 8, 3)


def test_a_photo_is_turned_upright(tmp_path, log):
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif, quality=100)
    image = read(tmp_path / "photo.jpg")
    assert image[4:].min() > 250 and image[:4].max() < 5
    assert log() == [f"image={tmp_path / 'photo.jpg'}: turned upright as its EXIF orientation says"]


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1", "I;16", "CMYK"])
def test_any_mode_becomes_rgb(tmp_path, log, mode):
    if mode == "I;16":
        source = Image.fromarray(np.full((8, 8), 200 * 257, np.uint16))
    elif mode in ("LA", "RGBA"):
        source = Image.new(mode, (8, 8), (0,) * len(mode))  # black, wholly transparent
    else:
        source = Image.new("RGB", (8, 8), (200,) * 3).convert(mode, dither=Image.Dither.NONE)
    source.save(tmp_path / "image.tif")
    expected = {"LA": 255, "RGBA": 255, "1": 255}.get(mode, 200)
    image = read(tmp_path / "image.tif")
    assert image.shape == (8, 8, 3) and np.abs(image.astype(int) - expected).max() <= 4
    assert log() == [f"image={tmp_path / 'image.tif'}: converted from mode {mode} to RGB"]


@pytest.mark.parametrize("mode", ["L", "1", "RGB", "RGBA"])
def test_a_mask_is_true_where_it_is_white(mode):
    mask = Image.new(mode, (8, 8))
    mask.paste("white", (0, 0, 4, 8))
    pixels = read(noise(8, 8, 3), mask)
    assert pixels.shape == (8, 8, 1) and pixels[:, :4].all() and not pixels[:, 4:].any()


def test_image_and_mask_are_cropped_alike():
    image, mask = np.zeros((16, 32, 3), np.uint8), np.zeros((8, 16), bool)
    image[:, 16:], mask[:, 8:] = 255, True
    inputs = read_inputs(Settings(image=image, mask=mask), 0, 4)
    np.testing.assert_array_equal(inputs["mask"][..., 0], inputs["image"][..., 0] > 127)
    assert inputs["mask"].sum() == 8


@pytest.mark.parametrize(
    ("image", "mask", "message"),
    [
        ("text.png", None, "image=text.png is not a readable image (UnidentifiedImageError)"),
        ("none.png", None, "image=none.png: no such file"),
        (np.zeros((8, 8, 3)), None, "image is an array float64 [8, 8, 3]; allowed: uint8"),
        (noise(8, 8, 3), "black.png", "mask=black.png is black everywhere; white marks"),
        (noise(8, 8, 3), noise(8, 6), "mask is 6x8, but the image is 8x8; the mask must have"),
    ],
)
def test_a_wrong_image_is_refused_in_one_line(tmp_path, monkeypatch, image, mask, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.png").write_text("hello")
    Image.new("L", (8, 8)).save("black.png")
    with pytest.raises(SettingError) as e:
        read(image, mask)
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


def broken(name, path):
    """Writes an image that a decoder must not be given, or cannot finish."""
    image = Image.fromarray(noise(64, 64, 3))
    if name == "bomb":
        Image.new("1", (10_000, 9_000)).save(path, "PNG")
    elif name == "pipe":
        os.mkfifo(path)
    elif name == "postscript":
        image.save(path, "EPS")
    elif name == "folder":
        path.mkdir()
    else:
        image.save(path, "JPEG" if name == "cut.jpeg" else "PNG", exif=image.getexif())
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if "cut" in name else data[:40] + data[60:])


@pytest.mark.parametrize("where", ["image", "mask"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bomb", "is 10000x9000 pixels; allowed: 67,108,864 pixels"),
        ("pipe", "is not a file"),
        ("folder", "is not a file"),
        ("postscript", "is not a readable image"),
        ("cut.jpeg", "is not a readable image"),
        ("cut.png", "is not a readable image"),
        ("holes.png", "is not a readable image"),
    ],
)
def test_a_bomb_or_a_broken_file_is_refused_in_one_line(tmp_path, where, name, message):
    broken(name, tmp_path / name)
    inputs = {"image": noise(64, 64, 3), where: str(tmp_path / name)}
    with pytest.raises(SettingError) as e:
        read_inputs(Settings(**{"strength": 0.5, **inputs}), 0, 8)
    assert str(e.value).startswith(f"{where}={tmp_path / name} ") and message in str(e.value)
    assert "\n" not in str(e.value)


def test_an_image_without_strength_or_mask_is_refused():
    for strength in (None, 1.0):
        with pytest.raises(SettingError, match=r"image needs a strength below 1 \(try 0.6\) or a"):
            read_inputs(Settings(image=noise(8, 8, 3), strength=strength), 0, 8)
