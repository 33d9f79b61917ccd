"""Requests of the drawing page are checked: types, lengths, ranges and images."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from imagen_jax.common.errors import UserError
from imagen_jax.web import requests

STAGE = {"steps": 2, "guidance": 3, "sampler": "ddim", "threshold": "static"}


def fields(**changes):
    return {"prompt": "a red circle", "seed": 1, "stages": [STAGE]} | changes


def url(image, kind="png"):
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def test_a_request_becomes_settings_per_stage():
    prompt, settings = requests.parse(
        fields(prompt=" a b ", stages=[STAGE, STAGE | {"steps": 4.0}]), 2
    )
    assert prompt == "a b" and settings.seed == 1
    assert settings.steps == [2, 4] and settings.guidance == [3.0, 3.0]
    assert settings.sampler == ["ddim", "ddim"] and settings.resample is None


def test_images_are_decoded_without_loss():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    picture, mask = Image.fromarray(pixels), Image.new("RGBA", (8, 8), "white")
    settings = requests.parse(fields(image=url(picture), mask=url(mask), resample=3), 1).settings
    np.testing.assert_array_equal(np.asarray(settings.image), pixels)
    assert settings.mask.mode == "RGBA" and settings.resample == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": ""}, "prompt must be a string of 1 to 1000"),
        ({"prompt": "x" * 1001}, "prompt must be"),
        ({"prompt": ["a"]}, "prompt must be"),
        ({"seed": -1}, "seed is -1; allowed: a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "seed is 4294967296"),
        ({"seed": True}, "seed is True"),
        ({"seed": "1"}, "seed is 1; allowed"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"seed": None}, "seed is None"),
        ({"stages": []}, "stages must be a list of 1"),
        ({"stages": [STAGE] * 2}, "stages must be a list of 1"),
        ({"stages": [{"steps": 2}]}, "each entry must be an object with"),
        ({"stages": [STAGE | {"steps": 0}]}, "steps is 0"),
        ({"stages": [STAGE | {"steps": 10**9}]}, "steps is 1000000000"),
        ({"stages": [STAGE | {"guidance": float("nan")}]}, "guidance is nan"),
        ({"stages": [STAGE | {"guidance": float("inf")}]}, "guidance is inf"),
        ({"stages": [STAGE | {"sampler": "euler"}]}, "sampler is 'euler'; allowed: ddim"),
        ({"stages": [STAGE | {"threshold": ["x"]}]}, "threshold is"),
        ({"image": "http://x/y.png"}, "image must be an image as a base64 data URL"),
        ({"image": "file:///etc/passwd"}, "image must be"),
        ({"image": 3}, "image must be"),
        ({"image": "data:image/png;base64,!!!!"}, "image is not a readable image"),
        ({"image": "data:image/png;base64,AAAA"}, "image is not a readable image"),
        ({"workdir": "/etc"}, "workdir is not a known field"),
    ],
)
def test_bad_fields_are_one_line_errors(changes, words):
    with pytest.raises(UserError) as e:
        requests.parse(fields(**changes), 1)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_large_image_is_refused_before_it_is_decoded():
    large = url(Image.new("1", (5000, 10)))
    with pytest.raises(UserError, match="image is 5000x10; allowed: up to 4096 pixels"):
        requests.parse(fields(image=large), 1)


def test_the_request_must_be_an_object():
    with pytest.raises(UserError, match="must be a JSON object"):
        requests.parse([1], 1)
