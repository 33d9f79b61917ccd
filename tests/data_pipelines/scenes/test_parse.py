"""Typed captions: their claims are those of the grammar, or there are none."""

from collections import Counter

import pytest

from data_pipelines.scenes import claims, parse
from data_pipelines.scenes.grammar import CATEGORIES, nth_scene


@pytest.mark.parametrize("category", CATEGORIES)
def test_captions_of_the_grammar_are_parsed_into_their_own_claims(category):
    parsed = 0
    for index in range(60):
        split = ("train", "heldout")[index % 2]
        scene = nth_scene(index, split, categories=(category,))
        found = parse.claims_of(scene.caption)
        if found is None:
            continue
        parsed += 1
        expected = Counter(map(str, scene.claims))
        assert Counter(map(str, found)) == expected, scene.caption
    assert parsed == 0 if category == "Misspellings" else parsed == 60


@pytest.mark.parametrize(
    ("caption", "words"),
    [
        ("a red circle", ["a red circle"]),
        ("An orange star.", ["an orange star"]),
        ("a big spotted heart in pink", ["a pink heart", "the pink heart is large",
                                         "the pink heart is dotted"]),
        ("two rings and 3 blue crosses", ["exactly 2 rings", "exactly 3 blue crosses"]),
        ("below a blue star is a red ring", ["a red ring", "a blue star",
                                             "the red ring is below the blue star"]),
        ('a red sun under the word "CAT" in green', [
            "a red sun", 'the word "CAT" in green', 'the red sun is below the word "CAT"']),
        ("a red circle and nothing else, on a navy background", [
            "a red circle", "exactly 1 object", "the background is navy"]),
    ],
)  # fmt: skip
def test_typed_captions(caption, words):
    assert [claims.in_words(claim) for claim in parse.claims_of(caption)] == words


@pytest.mark.parametrize(
    "caption",
    [
        "", "a", "red circle", "a red dog", "a red circel", "not a red circle",
        "a red circle without a blue star", "a red circle and a red circle",
        "a circle and a red circle", "a red circle left of", "six red circles",
        "a red circle with dots and stripes", "a blue red circle", "two large circles",
        'the word "XYLOPHONE"', "a red circle on a beige background",
    ],
)  # fmt: skip
def test_captions_outside_the_grammar_have_no_claims(caption):
    assert parse.claims_of(caption) is None
