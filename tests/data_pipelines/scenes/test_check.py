"""The checker: passes true renders, fails wrong ones, and accepts any image as input."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image, ImageFilter

from data_pipelines.scenes import measure
from data_pipelines.scenes.check import all_right, check
from data_pipelines.scenes.claims import holds
from data_pipelines.scenes.draw import render
from data_pipelines.scenes.grammar import sample_scene
from data_pipelines.scenes.scene import Picture, Thing, Word
from data_pipelines.scenes.see import see
from data_pipelines.scenes.vocabulary import BACKGROUNDS, RADII, SHAPES, contrasting


@pytest.mark.parametrize("resolution", [64, 256])
def test_passes_true_renders_and_fails_wrong_ones(resolution):
    rng = np.random.default_rng(resolution)
    scenes = [sample_scene(rng, "validation") for _ in range(150)]
    scores = measure.measure(scenes, resolution, rng)["all"]
    assert scores.right >= 0.99 * scores.pictures
    assert scores.claims_right >= 0.99 * scores.claims
    assert scores.wrong_passed <= 0.02 * scores.pictures
    assert scores.near_misses_passed <= 0.02 * scores.pictures


def test_passes_held_out_pairs():
    rng = np.random.default_rng(1)
    scenes = [sample_scene(rng, "heldout") for _ in range(100)]
    assert sum(all_right(check(render(scene, 64), scene)) for scene in scenes) >= 99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", ["small", "normal", "large"])
def test_sees_every_shape_at_every_size(shape, size):
    thing = Thing(shape, "purple", size, radius=sum(RADII[1][size]) / 2)
    [seen] = see(render(Picture("pale green", (thing,), None), 64)).objects
    assert (seen.shape, seen.color, seen.size, seen.texture) == (shape, "purple", size, "plain")
    assert abs(seen.x - 0.5) < 0.02 and abs(seen.y - 0.5) < 0.02


@pytest.mark.parametrize("texture", ["plain", "striped", "dotted"])
@pytest.mark.parametrize("background", BACKGROUNDS)
def test_sees_colors_and_textures_on_every_background(texture, background):
    for color in contrasting(background, texture != "plain"):
        thing = Thing("circle", color, texture=texture)
        picture = see(render(Picture(background, (thing,), None), 64))
        assert picture.background == background
        [seen] = picture.objects
        assert (seen.shape, seen.color, seen.texture) == ("circle", color, texture)


def test_reads_words_outside_the_vocabulary():
    word = Word("QXVKJ", "red", 0.5, 0.5, 0.2)
    picture = see(render(Picture("white", (), word), 64))
    assert picture.objects == () and picture.word.text == "QXVKJ" and picture.word.color == "red"


def test_does_not_use_the_recorded_layout():
    rng = np.random.default_rng(5)
    scene = next(s for s in iter(lambda: sample_scene(rng, "train"), None) if len(s.objects) == 3)
    blind = dataclasses.replace(scene, objects=(), background="navy", word=None)
    assert check(render(scene, 64), blind) == check(render(scene, 64), scene)


def test_tolerates_noise_blur_and_jpeg(tmp_path):
    rng = np.random.default_rng(2)
    scenes = [sample_scene(rng, "validation") for _ in range(60)]
    right = 0
    for scene in scenes:
        image = Image.fromarray(render(scene, 64)).filter(ImageFilter.GaussianBlur(0.5))
        image.save(tmp_path / "image.jpg", quality=90)
        noisy = np.asarray(Image.open(tmp_path / "image.jpg")) + rng.normal(0, 4, (64, 64, 3))
        right += all_right(check(np.clip(noisy, 0, 255).astype(np.uint8), scene))
    assert right >= 0.9 * len(scenes)


def _unusual_images() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (64, 64, 3))
    lines = np.zeros((33, 33, 3), np.uint8)
    lines[::4], lines[5:28, 16] = 255, 255
    blotches = np.asarray(Image.fromarray(noise[:9, :9]).resize((100, 100)))
    flat = [np.full((40, 40, 3), value, np.uint8) for value in (0, 128, 255)]
    return [noise, np.ascontiguousarray(ramp), lines, blotches, *flat]


@pytest.mark.parametrize("image", _unusual_images())
def test_gives_a_verdict_for_any_image(image):
    rng = np.random.default_rng(0)
    for _ in range(5):
        scene = sample_scene(rng, "train")
        assert len(check(image, scene)) == len(scene.claims)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((64, 64), np.uint8),
        np.zeros((64, 32, 3), np.uint8),
        np.zeros((16, 16, 3), np.uint8),
        np.zeros((64, 64, 3), np.float32),
    ],
)
def test_refuses_arrays_that_are_not_images(image):
    with pytest.raises(ValueError, match="allowed: uint8"):
        check(image, sample_scene(np.random.default_rng(0), "train"))


def test_claims_bind_attributes_to_objects():
    picture = Picture(
        "white",
        (Thing("circle", "red", "large", x=0.2), Thing("square", "blue", "small", x=0.8)),
        Word("CAT", "green", 0.5, 0.9, 0.1),
    )
    red_circle, blue_circle = ({"shape": "circle", "color": color} for color in ("red", "blue"))
    square = {"shape": "square"}
    for claim, truth in [
        ({"kind": "object", "object": red_circle}, True),
        ({"kind": "object", "object": blue_circle}, False),
        ({"kind": "count", "object": {}, "count": 2}, True),
        ({"kind": "count", "object": red_circle, "count": 2}, False),
        ({"kind": "size", "object": red_circle, "size": "large"}, True),
        ({"kind": "size", "object": square, "size": "large"}, False),
        ({"kind": "texture", "object": square, "texture": "striped"}, False),
        ({"kind": "relation", "a": red_circle, "b": square, "relation": "left of"}, True),
        ({"kind": "relation", "a": red_circle, "b": square, "relation": "right of"}, False),
        ({"kind": "relation", "a": red_circle, "b": {"word": "CAT"}, "relation": "above"}, True),
        ({"kind": "background", "color": "black"}, False),
        ({"kind": "word", "word": "CAT"}, True),
        ({"kind": "word", "word": "CAT", "color": "red"}, False),
        ({"kind": "word", "word": "DOG"}, False),
    ]:
        assert holds(claim, picture) is truth, claim


def test_refuses_unknown_kinds_of_claims():
    with pytest.raises(ValueError, match="claim kind 'mood' is unknown"):
        holds({"kind": "mood"}, Picture("white", (), None))


def _measure(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_pipelines.scenes.measure", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_measure_prints_a_table_for_every_resolution():
    done = _measure("--num=50", "--resolutions=32,64")
    assert done.returncode == 0, done.stderr
    assert "at 32 pixels" in done.stdout and "at 64 pixels" in done.stdout
    assert len([line for line in done.stdout.splitlines() if line.startswith("all ")]) == 2


def test_measure_refuses_a_bad_resolution():
    done = _measure("--resolutions=16")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --resolutions has '16'")
