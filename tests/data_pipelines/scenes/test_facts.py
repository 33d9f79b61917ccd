"""Labels for what captions state: all claimed facts, and the words that refer to things."""

from __future__ import annotations

import numpy as np

from data_pipelines.scenes.facts import FACTS, mentions, stated
from data_pipelines.scenes.grammar import sample_scene
from data_pipelines.scenes.scene import Scene


def scene(caption: str, *claims: dict) -> Scene:
    return Scene("white", (), None, caption, "", claims)


def test_a_caption_states_all_its_claims():
    claims = [
        {"kind": "object", "object": {"shape": "circle", "color": "red"}},
        {"kind": "size", "object": {"shape": "circle", "color": "red"}, "size": "large"},
        {"kind": "count", "object": {"shape": "star"}, "count": 2},
        {"kind": "relation", "a": {"shape": "star"}, "b": {"word": "CAT"}, "relation": "above"},
        {"kind": "word", "word": "CAT", "color": "blue"},
        {"kind": "background", "color": "navy"},
    ]
    assert stated(claims) == {
        "circle", "red", "large", "star", "2", "above", "below", "blue", "navy background",
    }  # fmt: skip


def test_words_refer_to_things_with_all_their_facts():
    a, b = {"shape": "circle", "color": "white"}, {"shape": "star", "color": "red"}
    caption = "a large white disc left of a bright red star on a white background"
    found = mentions(
        scene(
            caption,
            {"kind": "object", "object": a},
            {"kind": "size", "object": a, "size": "large"},
            {"kind": "relation", "a": a, "b": b, "relation": "left of"},
            {"kind": "background", "color": "white"},
        )
    )
    first, second = {"circle", "white", "large", "left of"}, {"star", "red", "right of"}
    assert [(caption[i:j], facts) for i, j, facts in found] == [
        ("white", first), ("disc", first), ("bright red", second), ("star", second),
    ]  # fmt: skip


def test_a_word_that_could_refer_to_two_things_is_left_out():
    things = ({"shape": "circle", "color": "red"}, {"shape": "star", "color": "red"})
    caption = "a red circle and a red star"
    found = mentions(scene(caption, *({"kind": "object", "object": thing} for thing in things)))
    assert [caption[i:j] for i, j, _ in found] == ["circle", "star"]


def test_labels_are_facts_and_most_scenes_have_mentions():
    rng = np.random.default_rng(0)
    scenes = [sample_scene(rng, "train") for _ in range(400)]
    assert set().union(*(stated(s.claims) for s in scenes)) == set(FACTS)
    found = [mentions(s) for s in scenes]
    assert set().union(*(facts for m in found for _, _, facts in m)) <= set(FACTS)
    assert np.mean([len(m) > 0 for m in found]) > 0.8
