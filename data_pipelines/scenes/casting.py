"""Chooses the things in a scene, by the split's rule, and places them without overlap."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data_pipelines.scenes import glyphs
from data_pipelines.scenes.scene import Thing, Word
from data_pipelines.scenes.vocabulary import (
    BACKGROUNDS,
    COLORS,
    HELD_OUT,
    RADII,
    SHAPES,
    TEXTURED_SHAPES,
    USUAL_COLORS,
    WORDS,
    contrasting,
)

MARGIN = 0.025
GAP = 0.055
# Largest offset from the middle, as a share of the free space.
NEAR = 0.3
# Largest offset of two related things across the axis of their relation.
MAX_DRIFT = 0.1


class Stuck(Exception):
    """No background contrasts with the colors, or the objects do not fit; sample again."""


def pick(rng: np.random.Generator, options: Sequence):
    """Picks one of `options`, all equally likely."""
    return options[int(rng.integers(len(options)))]


def is_usual(shape: str, color: str) -> bool:
    """Returns whether a shape is usually seen in a color."""
    return color in USUAL_COLORS.get(shape, COLORS)


def _pairs(split: str, conflicting: bool) -> list[tuple[str, str]]:
    return [
        (shape, color)
        for shape in SHAPES
        for color in COLORS
        if is_usual(shape, color) != conflicting
        and ((shape, color) in HELD_OUT) == (split == "heldout")
    ]


_PAIRS = {
    (split, conflicting): _pairs(split, conflicting)
    for split in ("train", "heldout")
    for conflicting in (False, True)
}


def _pair(rng: np.random.Generator, held_out: bool, conflicting: bool) -> tuple[str, str]:
    pairs = _PAIRS["heldout" if held_out else "train", conflicting]
    # A shape has one to eleven colors. Picking the shape first half of the time, and the color
    # first otherwise, makes no shape and no color rare.
    first = int(rng.integers(2))
    value = pick(rng, sorted({pair[first] for pair in pairs}))
    return pick(rng, [pair for pair in pairs if pair[first] == value])


def cast(
    rng: np.random.Generator, split: str, kinds: int, *, conflicting: bool = False
) -> list[Thing]:
    """Picks `kinds` plain things of normal size, no two with the same shape and color.

    In the heldout split the first is a held-out pair; other splits have none.
    """
    chosen: list[tuple[str, str]] = []
    while len(chosen) < kinds:
        pair = _pair(rng, split == "heldout" and not chosen, conflicting)
        if pair not in chosen:
            chosen.append(pair)
    return [Thing(shape, color) for shape, color in chosen]


def recolored(rng: np.random.Generator, thing: Thing) -> Thing:
    """Picks another of the shape's usual colors in train."""
    colors = [color for shape, color in _PAIRS["train", False] if shape == thing.shape]
    return dataclasses.replace(thing, color=pick(rng, colors))


def vary_texture(rng: np.random.Generator, thing: Thing, chance: float) -> Thing:
    """Makes a thing striped or dotted, with probability `chance`, if a pattern fits on it."""
    if thing.shape not in TEXTURED_SHAPES or rng.random() > chance:
        return thing
    return dataclasses.replace(thing, texture=pick(rng, ("striped", "dotted")))


def vary_sizes(rng: np.random.Generator, things: list[Thing], chance: float) -> list[Thing]:
    """Makes one or two things large or small, with probability `chance`; two large do not fit."""
    sizes = ["normal"] * len(things)
    if rng.random() < chance:
        sizes = pick(rng, {1: (["large"], ["small"]), 2: _SIZE_PAIRS}[len(things)])
    return [
        # A pattern on a small thing is invisible at 64 pixels.
        dataclasses.replace(thing, size=size, texture="plain" if size == "small" else thing.texture)
        for thing, size in zip(things, sizes, strict=True)
    ]


_SIZE_PAIRS = (
    ["large", "small"], ["small", "large"], ["large", "normal"], ["normal", "large"],
    ["small", "normal"], ["normal", "small"],
)  # fmt: skip


def choose_background(rng: np.random.Generator, things: Sequence[Thing | Word]) -> str:
    """Picks a background on which all `things` are visible, often white.

    Raises:
      Stuck: there is none.
    """
    suitable = [name for name in BACKGROUNDS if contrasts(name, things)]
    if not suitable:
        raise Stuck
    if "white" in suitable and rng.random() < 0.4:
        return "white"
    return pick(rng, suitable)


def contrasts(background: str, things: Sequence[Thing | Word]) -> bool:
    """Returns whether all `things` are visible on a background."""
    return all(
        thing.color in contrasting(background, getattr(thing, "texture", "plain") != "plain")
        for thing in things
    )


def scatter(rng: np.random.Generator, things: list[Thing], top=0.0, bottom=1.0) -> list[Thing]:
    """Places things at random in a band of the image, with their bounding boxes apart.

    Raises:
      Stuck: they did not fit.
    """
    placed: list[Thing] = []
    for thing in (_with_radius(rng, thing, len(things)) for thing in things):
        for _ in range(40):
            edge = thing.radius + MARGIN
            x, y = rng.uniform(edge, 1 - edge), rng.uniform(top + edge, bottom - edge)
            if all(
                max(abs(x - other.x), abs(y - other.y)) > thing.radius + other.radius + GAP
                for other in placed
            ):
                placed.append(_at(thing, x, y))
                break
        else:
            raise Stuck
    return placed


def near_middle(rng: np.random.Generator, things: list[Thing]) -> list[Thing]:
    """Places one thing near the middle of the image, or two beside each other, the first left."""
    things = [_with_radius(rng, thing, len(things)) for thing in things]
    gap = (1 - 2 * sum(thing.radius for thing in things)) / (len(things) + 1)
    placed, left = [], 0.0
    for thing in things:
        left += gap
        edge = thing.radius + MARGIN
        x = left + thing.radius + rng.uniform(-1, 1) * NEAR * max(gap - GAP, 0)
        y = 0.5 + rng.uniform(-1, 1) * NEAR * (0.5 - edge)
        placed.append(_at(thing, x, y))
        left += 2 * thing.radius
    return placed


def side_by_side(rng: np.random.Generator, things: list[Thing], relation: str) -> list[Thing]:
    """Places two things so that the first is in `relation` to the second."""
    a, b = (_with_radius(rng, thing, 2) for thing in things)
    first, second = (a, b) if relation in ("left of", "above") else (b, a)
    slack = 1 - 2 * (MARGIN + first.radius + second.radius) - GAP
    start, apart = np.sort(rng.uniform(0, slack, 2))
    along = [MARGIN + first.radius + start, MARGIN + 2 * first.radius + GAP + apart + second.radius]
    edge = max(a.radius, b.radius) + MARGIN
    middle = rng.uniform(edge, 1 - edge)
    across = [np.clip(middle + rng.uniform(-1, 1) * MAX_DRIFT, edge, 1 - edge) for _ in range(2)]
    xs, ys = (along, across) if relation in ("left of", "right of") else (across, along)
    placed = [_at(thing, xs[i], ys[i]) for i, thing in enumerate((first, second))]
    return placed if first is a else placed[::-1]


def write(rng: np.random.Generator, color: str, max_height: float, top=0.0, bottom=1.0) -> Word:
    """Places a word, as large as fits, in a band of the image."""
    text = pick(rng, WORDS)
    width = rng.uniform(0.86, 0.94)
    aspect = glyphs.columns(len(text)) / glyphs.ROWS
    height = min(width / aspect, max_height)
    x_edge, y_edge = height * aspect / 2 + MARGIN, height / 2 + MARGIN
    x, y = rng.uniform(x_edge, 1 - x_edge), rng.uniform(top + y_edge, bottom - y_edge)
    return Word(text, color, *_rounded(x, y, height))


def place_beside_word(rng: np.random.Generator, thing: Thing, top: float, bottom: float) -> Thing:
    """Places a thing of normal size in the band of the image without the word."""
    radius = rng.uniform(*RADII[2]["normal"])
    edge = radius + MARGIN
    x, y = rng.uniform(edge, 1 - edge), rng.uniform(top + edge, bottom - edge)
    (radius,) = _rounded(radius)
    return _at(dataclasses.replace(thing, radius=radius), x, y)


def _with_radius(rng: np.random.Generator, thing: Thing, among: int) -> Thing:
    (radius,) = _rounded(rng.uniform(*RADII[among][thing.size]))
    return dataclasses.replace(thing, radius=radius)


def _at(thing: Thing, x: float, y: float) -> Thing:
    x, y = _rounded(x, y)
    return dataclasses.replace(thing, x=x, y=y)


def _rounded(*values: float) -> list[float]:
    """Rounds to four decimals: a tenth of a pixel at 1024, and short JSON."""
    return [round(float(value), 4) for value in values]
