"""English for the parts of a scene: nouns, adjectives, relations, and misspellings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from data_pipelines.scenes.casting import pick
from data_pipelines.scenes.scene import Thing
from data_pipelines.scenes.vocabulary import COLORS, SHAPES

# Pairs of singular and plural; the first pair is the usual one.
NOUNS = {shape: [(shape, shape + "s")] for shape in SHAPES} | {
    "circle": [("circle", "circles"), ("disc", "discs")],
    "diamond": [("diamond", "diamonds"), ("rhombus", "rhombuses")],
    "heart": [("heart", "hearts"), ("heart shape", "heart shapes")],
    "cross": [("cross", "crosses"), ("plus sign", "plus signs")],
    "moon": [("moon", "moons"), ("crescent moon", "crescent moons")],
    "leaf": [("leaf", "leaves")],
}
COLOR_WORDS = {color: (color,) for color in COLORS} | {
    "red": ("red", "bright red"),
    "turquoise": ("turquoise", "teal"),
    "purple": ("purple", "violet"),
}
SIZE_WORDS = {
    "small": ("small", "little", "tiny"),
    "normal": ("",),
    "large": ("large", "big", "huge"),
}
TEXTURE_WORDS = {"plain": ("",), "striped": ("striped",), "dotted": ("dotted", "spotted")}
TEXTURE_TAILS = {"plain": ("",), "striped": (" with stripes",), "dotted": (" with dots",)}
RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above", "over"),
    "below": ("below", "under", "beneath", "underneath"),
}
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five"}

Spelling = Callable[[str], str]


def usually(rng: np.random.Generator, options) -> str:
    """Returns the first of `options` two times in three, otherwise a random one."""
    return options[0] if rng.random() < 0.67 else pick(rng, options)


def with_article(phrase: str) -> str:
    """Puts "a" or "an" before a phrase."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def describe(rng: np.random.Generator, thing: Thing, spell: Spelling = str) -> str:
    """Makes a noun phrase without article or number: "large striped red circle"."""
    return _describe(rng, thing, 0, spell)


def describe_many(rng: np.random.Generator, number: int, thing: Thing, color: bool = True) -> str:
    """Makes a noun phrase with a number: "three red circles", "one blue star"."""
    phrase = _describe(rng, thing, int(number > 1), str, color)
    return f"{NUMBERS[number] if rng.random() < 0.85 else number} {phrase}"


def _describe(
    rng: np.random.Generator, thing: Thing, plural: int, spell: Spelling, with_color: bool = True
) -> str:
    noun = spell(usually(rng, NOUNS[thing.shape])[plural])
    color = spell(usually(rng, COLOR_WORDS[thing.color])) if with_color else ""
    texture, tail = usually(rng, TEXTURE_WORDS[thing.texture]), ""
    if rng.random() < 0.25:
        texture, tail = "", usually(rng, TEXTURE_TAILS[thing.texture])
    manner = rng.random()
    if color and manner < 0.06 and not tail:
        color, tail = "", f" in {color}"
    elif color and manner < 0.12:
        color += "-colored"
    adjectives = [usually(rng, SIZE_WORDS[thing.size]), texture, color]
    return " ".join([word for word in adjectives if word] + [noun]) + tail


def misspell(rng: np.random.Generator, word: str) -> str:
    """Misspells the last word of a phrase, but never as another word of the vocabulary."""
    before, space, word = word.rpartition(" ")
    known = {w for words in (*NOUNS.values(), COLOR_WORDS.values()) for pair in words for w in pair}
    while True:
        at = int(rng.integers(1, len(word)))
        slip = pick(rng, ("swap", "drop", "double", "wrong"))
        if slip == "swap":
            slipped = word[:at] + word[at + 1 : at + 2] + word[at] + word[at + 2 :]
        elif slip == "drop":
            slipped = word[:at] + word[at + 1 :]
        elif slip == "double":
            slipped = word[: at + 1] + word[at:]
        else:
            slipped = word[:at] + pick(rng, "aeiou") + word[at + 1 :]
        if slipped != word and len(slipped) > 2 and slipped not in known:
            return before + space + slipped
