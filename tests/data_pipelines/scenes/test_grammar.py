"""Scenes: held-out pairs, determinism, true captions, drawing."""

from __future__ import annotations

import collections
import itertools

import numpy as np
import pytest
from skimage.measure import label

from data_pipelines.scenes import glyphs
from data_pipelines.scenes.claims import holds
from data_pipelines.scenes.draw import render
from data_pipelines.scenes.grammar import CATEGORIES, SPLITS, sample_scene
from data_pipelines.scenes.scene import Picture, Scene, Thing
from data_pipelines.scenes.shapes import OUTLINES
from data_pipelines.scenes.vocabulary import COLORS, HELD_OUT, SHAPES, TEXTURES, WORDS, contrasting

NUM = 4000


@pytest.fixture(scope="module")
def scenes() -> dict[str, list[Scene]]:
    """NUM scenes of every split."""
    rng = np.random.default_rng(7)
    return {split: [sample_scene(rng, split) for _ in range(NUM)] for split in SPLITS}


def _pairs(scene: Scene) -> set[tuple[str, str]]:
    return {(thing.shape, thing.color) for thing in scene.objects}


def test_every_heldout_scene_has_a_held_out_pair_and_no_other_scene_has(scenes):
    for scene in scenes["train"] + scenes["validation"]:
        assert not _pairs(scene) & HELD_OUT
    for scene in scenes["heldout"]:
        assert _pairs(scene) & HELD_OUT


def test_train_has_every_attribute_and_heldout_every_held_out_pair(scenes):
    things = [thing for scene in scenes["train"] for thing in scene.objects]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.color for thing in things} == set(COLORS)
    assert {thing.texture for thing in things} == set(TEXTURES)
    assert set.union(*map(_pairs, scenes["heldout"])) >= HELD_OUT


def test_held_out_pairs_name_shapes_and_colors():
    assert all(shape in SHAPES and color in COLORS for shape, color in HELD_OUT)


def test_same_seed_gives_same_scenes():
    first, second = (
        [sample_scene(rng, "train") for _ in range(50)]
        for rng in (np.random.default_rng(3), np.random.default_rng(3))
    )
    assert first == second


def test_json_round_trips(scenes):
    for scene in scenes["train"][:300]:
        assert Scene.from_json(scene.to_json()) == scene


def test_refuses_an_unknown_split():
    with pytest.raises(ValueError, match="split is 'test'; allowed: train"):
        sample_scene(np.random.default_rng(0), "test")


def test_every_claim_is_true_of_the_scene(scenes):
    for scene in itertools.chain(*scenes.values()):
        assert scene.claims
        for claim in scene.claims:
            assert holds(claim, scene), (scene.caption, claim)


def test_captions_are_short_ascii_and_varied(scenes):
    captions = [scene.caption for scene in scenes["train"]]
    assert max(len(caption.encode()) for caption in captions) <= 180
    assert all(caption.isascii() and "  " not in caption for caption in captions)
    assert len(set(captions)) > NUM / 2


def test_categories_all_occur_and_simple_captions_dominate(scenes):
    counts = collections.Counter(scene.category for scene in scenes["train"])
    assert set(counts) == set(CATEGORIES) - {"Simple"}
    assert counts.most_common(1)[0][0] == "Colors"
    single = sum(len(scene.objects) == 1 and not scene.word for scene in scenes["train"])
    assert single > 0.35 * NUM
    assert {len(scene.objects) for scene in scenes["train"]} == {0, 1, 2, 3, 4, 5}


def test_simple_scenes_are_near_the_middle_and_their_captions_complete():
    for i in range(200):
        scene = sample_scene(np.random.default_rng([0, i]), "train", ("Simple",))
        assert scene.claims[-1] == {"kind": "background", "color": scene.background}
        assert all(abs(thing.y - 0.5) < 0.12 for thing in scene.objects)
        middle = np.mean([thing.x for thing in scene.objects])
        assert abs(middle - 0.5) < 0.15
        assert list(scene.objects) == sorted(scene.objects, key=lambda thing: thing.x)


def test_objects_are_inside_apart_and_visible(scenes):
    simple = [sample_scene(np.random.default_rng([0, i]), "train", ("Simple",)) for i in range(99)]
    for scene in scenes["train"] + simple:
        for thing in scene.objects:
            assert thing.color in contrasting(scene.background, thing.texture != "plain")
            assert min(thing.x, thing.y) - thing.radius > 0
            assert max(thing.x, thing.y) + thing.radius < 1
        for a, b in itertools.combinations(scene.objects, 2):
            assert max(abs(a.x - b.x), abs(a.y - b.y)) > a.radius + b.radius


def test_words_are_inside_and_apart_from_objects(scenes):
    worded = [scene for scene in scenes["train"] + scenes["heldout"] if scene.word]
    assert len(worded) > 100
    for scene in worded:
        word = scene.word
        half_width = word.height * glyphs.columns(len(word.text)) / glyphs.ROWS / 2
        assert half_width < min(word.x, 1 - word.x)
        for thing in scene.objects:
            assert abs(thing.y - word.y) > thing.radius + word.height / 2


@pytest.mark.parametrize("size", [32, 64, 256, 1024])
def test_a_scene_looks_the_same_at_every_size(scenes, size):
    for scene in scenes["train"][:8]:
        image = render(scene, size)
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        coarse = image.reshape(32, size // 32, 32, size // 32, 3).mean((1, 3))
        assert np.abs(coarse - render(scene, 32).astype(float)).mean() < 1.0


def test_edges_are_antialiased():
    image = render(Picture("white", (Thing("circle", "black"),), None), 64)
    assert len(np.unique(image)) > 10


@pytest.mark.parametrize("shape", SHAPES)
def test_outlines_fill_their_box_and_are_connected(shape):
    low, high = OUTLINES[shape].min(axis=0), OUTLINES[shape].max(axis=0)
    np.testing.assert_allclose(low + high, 0, atol=1e-9)
    assert (high - low).max() == pytest.approx(2)
    image = render(Picture("white", (Thing(shape, "black", radius=0.12),), None), 64)
    assert label(image[..., 0] < 128).max() == 1


def test_glyphs_differ_and_touch_all_four_sides():
    tables = [glyph.tobytes() for glyph in glyphs.GLYPHS.values()]
    assert len(set(tables)) == len(tables) == 26
    for glyph in glyphs.GLYPHS.values():
        assert glyph[0].any() and glyph[-1].any() and glyph[:, 0].any() and glyph[:, -1].any()


def test_words_are_three_to_six_capitals():
    assert all(3 <= len(word) <= 6 and set(word) <= set(glyphs.GLYPHS) for word in WORDS)
