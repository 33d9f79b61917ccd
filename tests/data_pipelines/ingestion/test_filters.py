"""Filters by captions and scores, each of which can be switched off."""

import pytest

from data_pipelines.common import Skip
from data_pipelines.ingestion import filters
from data_pipelines.ingestion.items import Caption, Item, find_captions, find_scores
from data_pipelines.ingestion.options import Options
from imagen_jax.common.errors import UserError


def item(*captions, **scores):
    return Item("x", b"", tuple(map(Caption, captions)), scores)


def captions(found):
    return found.reason if isinstance(found, Skip) else [c.text for c, _ in found[0]]


@pytest.mark.parametrize(
    ("scores", "options", "reason"),
    [
        ({}, {}, None),
        ({"pwatermark": 0.81}, {}, "pwatermark beyond --max_watermark=0.8"),
        ({"pwatermark": 0.8}, {}, None),
        ({"pwatermark": 1.0}, {"max_watermark": 1.0}, None),
        ({"punsafe": 0.6}, {}, "punsafe beyond --max_unsafe=0.5"),
        ({"punsafe": 0.6}, {"max_unsafe": 1.0}, None),
        ({"similarity": 0.2}, {"min_similarity": 0.3}, "similarity beyond --min_similarity=0.3"),
        ({"similarity": 0.2}, {}, None),
    ],
)
def test_scores(scores, options, reason):
    found = filters.by_scores(item("x", **scores), Options(**options))
    assert (found and found.reason) == reason


def test_lengths_of_captions():
    options = Options(encoder="", min_caption_length=3, max_caption_length=5)
    assert captions(filters.by_captions(item("ab"), options)).startswith("caption below --min")
    assert captions(filters.by_captions(item("abcdef"), options)).startswith("caption beyond --max")
    usable, changes = filters.by_captions(item("ab", "abcd"), options)
    assert [c.text for c, _ in usable] == ["abcd"]
    assert [c.reason for c in changes] == [
        "one of the captions: caption below --min_caption_length=3"
    ]


def test_tokens_of_the_encoder():
    long = item("word " * 50)
    refused = captions(filters.by_captions(long, Options(max_tokens=64)))
    assert refused == "caption longer than --max_tokens=64"
    [cut], changes = filters.by_captions(long, Options(max_tokens=64, truncate_captions=True))
    assert cut[0].text == " ".join(["word"] * 12) and changes[0].reason == "caption truncated"
    assert captions(filters.by_captions(long, Options(encoder="", max_tokens=64)))[0]


def test_languages():
    german, english = "Ein roter Kreis auf weißem Grund", "A photograph of the old town hall"
    options = Options(encoder="", languages=("en",))
    assert captions(filters.by_captions(item(german, english), options)) == [english]
    assert captions(filters.by_captions(item(german), options)) == "caption not in --languages=en"
    assert filters.language(german) == "de"
    with pytest.raises(UserError, match=r"--languages has 'xx'; allowed: .*de, .*en"):
        filters.check_languages(("en", "xx"))


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"x": 1}, (), None),
        ({"TEXT": "a"}, (), [("a", "")]),
        ({"caption": None, "text": " b  c "}, (), [("b c", "")]),
        ({"sentences": [{"raw": "a"}, {"raw": "b"}, {"raw": "a"}]}, (), [("a", ""), ("b", "")]),
        ({"caption": ["a", 3, None, ""]}, (), [("a", "")]),
        ({"alt": "a", "text": "b"}, ("alt",), [("a", "")]),
        (
            {"alt": "a", "new": ["b", "c"]},
            ("alt", "new"),
            [("a", "alt"), ("b", "new"), ("c", "new")],
        ),
    ],
)
def test_captions_of_a_row(row, columns, expected):
    found = find_captions(row, columns)
    assert (found if found is None else [tuple(c) for c in found]) == expected


def test_scores_of_a_row():
    row = {"PWATERMARK": "0.5", "punsafe": float("nan"), "similarity": None, "other": 1}
    assert find_scores(row) == {"pwatermark": 0.5}
    assert find_scores({"punsafe": True, "similarity": "high"}) == {}
