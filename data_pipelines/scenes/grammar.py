"""Samples captioned scenes in the categories of DrawBench that a program can check."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.scenes import casting, claims, phrases
from data_pipelines.scenes.casting import pick
from data_pipelines.scenes.phrases import describe, describe_many, with_article
from data_pipelines.scenes.scene import Scene, Thing, Word
from data_pipelines.scenes.vocabulary import COLORS, MAX_OBJECTS, RELATIONS, SPLITS

MAX_CAPTION_BYTES = 180

OPENINGS = (
    "{}", "{}", "{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", "there is {}",
    "a simple picture of {}", "an illustration of {}", "a flat drawing of {}",
)  # fmt: skip
ON_BACKGROUND = ("on a {} background", "against a {} background", "in front of a {} background")


def sample_scene(rng: np.random.Generator, split: str, categories: Sequence[str] = ()) -> Scene:
    """Samples a scene with its caption; depends only on the state of `rng` and the arguments.

    Args:
      split: one of SPLITS.
      categories: some of CATEGORIES; () is all of DrawBench's.

    Raises:
      ValueError: the split is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    names = list(categories or DRAWBENCH)
    shares = np.array([CATEGORIES[name][0] for name in names])
    category = str(rng.choice(names, p=shares / shares.sum()))
    while True:
        try:
            scene = CATEGORIES[category][1](rng, split)
        except casting.Stuck:
            continue
        if len(scene.caption.encode()) <= MAX_CAPTION_BYTES:
            return dataclasses.replace(scene, category=category)


def nth_scene(index: int, split: str, seed: int = 0, categories: Sequence[str] = ()) -> Scene:
    """Returns scene `index` of a split, the same at every resolution; see `sample_scene`."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    return sample_scene(rng, split, categories)


def _finish(
    rng: np.random.Generator,
    caption: str,
    stated: list[dict],
    objects: list[Thing],
    *,
    word: Word | None = None,
    background_chance: float = 0.3,
) -> Scene:
    """Chooses the background, mentions it with `background_chance`, and makes the scene."""
    background = casting.choose_background(rng, [*objects, word] if word else objects)
    if rng.random() < background_chance:
        caption += " " + phrases.usually(rng, ON_BACKGROUND).format(background)
        stated = [*stated, {"kind": "background", "color": background}]
    if rng.random() < 0.15:
        caption = caption[0].upper() + caption[1:] + "."
    return Scene(background, tuple(objects), word, caption, "", tuple(stated))


def _about_all(things: list[Thing]) -> list[dict]:
    return [claim for thing in things for claim in claims.about(thing)]


def _listing(rng: np.random.Generator, things: list[Thing], spell: phrases.Spelling = str) -> str:
    named = [with_article(describe(rng, thing, spell)) for thing in things]
    return pick(rng, OPENINGS).format(_joined(rng, named))


def _joined(rng: np.random.Generator, named: list[str]) -> str:
    if len(named) == 1:
        return named[0]
    link = pick(rng, (" and ", " and ", " with ")) if len(named) == 2 else " and "
    return ", ".join(named[:-1]) + link + named[-1]


def _colors(rng: np.random.Generator, split: str) -> Scene:
    kinds = 1 if rng.random() < 0.72 else 2
    things = [casting.vary_texture(rng, t, 0.3) for t in casting.cast(rng, split, kinds)]
    things = casting.scatter(rng, casting.vary_sizes(rng, things, 0.35))
    return _finish(rng, _listing(rng, things), _about_all(things), things)


def _simple(rng: np.random.Generator, split: str) -> Scene:
    """The caption leaves nothing open but small offsets, so few examples teach what words mean."""
    kinds = 1 if rng.random() < 0.75 else 2
    things = casting.cast(rng, split, kinds, conflicting=rng.random() < 0.5)
    things = casting.near_middle(rng, casting.vary_sizes(rng, things, 0.5))
    return _finish(rng, _listing(rng, things), _about_all(things), things, background_chance=1.0)


def _conflicting(rng: np.random.Generator, split: str) -> Scene:
    kinds = 1 if rng.random() < 0.75 else 2
    things = casting.cast(rng, split, kinds, conflicting=True)
    things = casting.scatter(rng, casting.vary_sizes(rng, things, 0.2))
    return _finish(rng, _listing(rng, things), _about_all(things), things)


def _misspellings(rng: np.random.Generator, split: str) -> Scene:
    kinds = 1 if rng.random() < 0.75 else 2
    things = casting.scatter(rng, casting.cast(rng, split, kinds))
    wrong_first = rng.random() < 0.5
    words = []

    def spell(word: str) -> str:
        """Misspells every other word."""
        words.append(word)
        wrong = len(words) % 2 == wrong_first
        return phrases.misspell(rng, word) if wrong else word

    return _finish(rng, _listing(rng, things, spell), _about_all(things), things)


def _counting(rng: np.random.Generator, split: str) -> Scene:
    number = int(rng.integers(2, MAX_OBJECTS + 1))
    others = int(rng.random() < 0.3) * int(rng.integers(1, max(2, MAX_OBJECTS - number + 1)))
    if number + others > MAX_OBJECTS:
        others = 0
    first, second = casting.cast(rng, split, 2)
    many = [first] * number
    by_color = rng.random() < 0.75 or others > 0
    if not by_color:
        many = [first] + [casting.recolored(rng, first) for _ in range(number - 1)]
    things = casting.scatter(rng, many + [second] * others)
    ref = claims.reference(first) if by_color else {"shape": first.shape}
    stated = [{"kind": "count", "object": ref, "count": number}]
    caption = describe_many(rng, number, first, by_color)
    if others:
        stated.append({"kind": "count", "object": claims.reference(second), "count": others})
        caption += " and " + describe_many(rng, others, second)
    opening = pick(rng, ("{}", "{}", "{}", "a picture of {}", "a picture with {}", "there are {}",
                         "exactly {}"))  # fmt: skip
    return _finish(rng, opening.format(caption), stated, things)


def _positional(rng: np.random.Generator, split: str) -> Scene:
    things = [casting.vary_texture(rng, t, 0.15) for t in casting.cast(rng, split, 2)]
    relation = pick(rng, RELATIONS)
    things = _shuffled(rng, things)
    things = casting.side_by_side(rng, casting.vary_sizes(rng, things, 0.15), relation)
    stated = [*_about_all(things), _relation(*map(claims.reference, things), relation)]
    caption = _related(rng, things, relation, inverted_chance=0.4)
    return _finish(rng, caption, stated, things, background_chance=0.2)


def _descriptions(rng: np.random.Generator, split: str) -> Scene:
    things = casting.cast(rng, split, int(rng.integers(1, 4)))
    if len(things) == 3:
        things = casting.scatter(rng, [casting.vary_texture(rng, t, 0.3) for t in things])
        named = _joined(rng, [with_article(describe(rng, thing)) for thing in things])
        stated = _about_all(things)
    elif len(things) == 2:
        things = [casting.vary_texture(rng, t, 0.4) for t in _shuffled(rng, things)]
        relation = pick(rng, RELATIONS)
        things = casting.side_by_side(rng, casting.vary_sizes(rng, things, 0.7), relation)
        named = _related(rng, things, relation)
        stated = [*_about_all(things), _relation(*map(claims.reference, things), relation)]
    else:
        things = [casting.vary_texture(rng, things[0], 0.6)]
        things = casting.scatter(rng, casting.vary_sizes(rng, things, 0.7))
        named = with_article(describe(rng, things[0]))
        stated = _about_all(things)
    opening = pick(rng, ("a simple flat illustration of {}", "a clean vector drawing showing {}",
                         "a minimal poster with {}", "a picture of {}"))  # fmt: skip
    caption = opening.format(named)
    if rng.random() < 0.4:
        caption += pick(rng, (", with nothing else in the picture,", " and nothing else,"))
        stated.append({"kind": "count", "object": {}, "count": len(things)})
    return _finish(rng, caption, stated, things, background_chance=1.0)


def _text(rng: np.random.Generator, split: str) -> Scene:
    if split == "heldout" or rng.random() < 0.35:
        return _text_with_object(rng, split)
    word = casting.write(rng, pick(rng, list(COLORS)), max_height=0.34)
    color = phrases.usually(rng, phrases.COLOR_WORDS[word.color])
    claim = {"kind": "word", "word": word.text}
    if rng.random() < 0.7:
        claim["color"] = word.color
        form = pick(rng, ('the word "{}" in {}', 'the word "{}" in {} letters', '"{}" in {}',
                          '"{}" written in {} letters', 'the text "{}" in {}'))  # fmt: skip
        caption = form.format(word.text, color)
    else:
        form = pick(rng, ('the word "{}"', 'text that reads "{}"', 'a sign that says "{}"',
                          '"{}" in capital letters', 'the letters "{}"'))  # fmt: skip
        caption = form.format(word.text)
    return _finish(rng, caption, [claim], [], word=word)


def _text_with_object(rng: np.random.Generator, split: str) -> Scene:
    [thing] = casting.cast(rng, split, 1)
    on_top = rng.random() < 0.5
    word_band, thing_band = ((0.5, 1.0), (0.0, 0.52)) if on_top else ((0.0, 0.5), (0.48, 1.0))
    word = casting.write(rng, pick(rng, list(COLORS)), 0.28, *word_band)
    thing = casting.place_beside_word(rng, thing, *thing_band)
    relation = "above" if on_top else "below"
    named = with_article(describe(rng, thing))
    color = f" in {word.color}" if rng.random() < 0.5 else ""
    caption = f'{named} {pick(rng, phrases.RELATION_WORDS[relation])} the word "{word.text}"{color}'
    claim = {"kind": "word", "word": word.text} | ({"color": word.color} if color else {})
    stated = [*claims.about(thing), claim,
              _relation(claims.reference(thing), {"word": word.text}, relation)]  # fmt: skip
    return _finish(rng, caption, stated, [thing], word=word)


def _relation(a: dict, b: dict, relation: str) -> dict:
    return {"kind": "relation", "a": a, "b": b, "relation": relation}


def _related(
    rng: np.random.Generator, things: list[Thing], relation: str, *, inverted_chance: float = 0.0
) -> str:
    a, b = (with_article(describe(rng, thing)) for thing in things)
    words = phrases.usually(rng, phrases.RELATION_WORDS[relation])
    if rng.random() < inverted_chance:
        return f"{words} {b} {pick(rng, ('is', 'there is'))} {a}"
    return f"{a} {pick(rng, ('', '', 'placed '))}{words} {b}"


def _shuffled(rng: np.random.Generator, things: list[Thing]) -> list[Thing]:
    return [things[i] for i in rng.permutation(len(things))]


# Each category's share and sampler. Captions of one or two objects dominate. Simple is not one of
# DrawBench's and occurs only if it is named: it teaches what words mean from few examples.
CATEGORIES = {
    "Colors": (0.40, _colors),
    "Counting": (0.14, _counting),
    "Positional": (0.14, _positional),
    "Descriptions": (0.10, _descriptions),
    "Text": (0.10, _text),
    "Conflicting": (0.07, _conflicting),
    "Misspellings": (0.05, _misspellings),
    "Simple": (0.40, _simple),
}
DRAWBENCH = tuple(name for name in CATEGORIES if name != "Simple")
