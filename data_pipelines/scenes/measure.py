"""Measures how often the checker passes true renders, and how often it passes wrong images.

    python -m data_pipelines.scenes.measure --num=1000

For each resolution and category it prints

    right        share of true renders that pass all claims
    claims       share of all claims that pass on true renders
    wrong        share of wrong images that pass all claims: renders of other scenes, half of them
                 of the same category
    near misses  share of renders with one change that pass all claims: a color, a shape, a
                 texture, a size, the background, the word, a missing object, mirrored positions

The description of a wrong image or near miss never satisfies the caption.
"""

from __future__ import annotations

import collections
import dataclasses
import time

import numpy as np
from absl import flags

from data_pipelines.scenes import casting
from data_pipelines.scenes.claims import holds
from data_pipelines.scenes.draw import render
from data_pipelines.scenes.grammar import sample_scene
from data_pipelines.scenes.scene import Picture, Scene, Thing, Word
from data_pipelines.scenes.vocabulary import (
    BACKGROUNDS,
    COLORS,
    RADII,
    SHAPES,
    SPLITS,
    TEXTURED_SHAPES,
    TEXTURES,
    WORDS,
)
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError


@dataclasses.dataclass
class Score:
    """Counts for one resolution, or for one category at one resolution."""

    pictures: int = 0
    right: int = 0
    claims: int = 0
    claims_right: int = 0
    wrong_passed: int = 0
    near_misses_passed: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        milliseconds = self.seconds / self.pictures * 1e3
        return (
            f"{self.pictures:9d}{self.right / self.pictures:9.2%}"
            f"{self.claims_right / self.claims:9.2%}{self.wrong_passed / self.pictures:9.2%}"
            f"{self.near_misses_passed / self.pictures:13.2%}{milliseconds:10.1f}"
        )


def measure(scenes: list[Scene], resolution: int, rng: np.random.Generator) -> dict[str, Score]:
    """Scores the checker on renders at one resolution, by category and under "all"."""
    # Imports scikit-image, which --help does not need.
    from data_pipelines.scenes.check import all_right, check

    scores: dict[str, Score] = collections.defaultdict(Score)
    for scene in scenes:
        image = render(scene, resolution)
        start = time.perf_counter()
        verdicts = check(image, scene)
        seconds = time.perf_counter() - start
        wrong = all_right(check(render(other_scene(rng, scene, scenes), resolution), scene))
        missed = all_right(check(render(near_miss(rng, scene), resolution), scene))
        for score in (scores[scene.category], scores["all"]):
            score.pictures += 1
            score.right += all_right(verdicts)
            score.claims += len(verdicts)
            score.claims_right += sum(verdict.ok for verdict in verdicts)
            score.wrong_passed += wrong
            score.near_misses_passed += missed
            score.seconds += seconds
    return dict(scores)


def other_scene(rng: np.random.Generator, scene: Scene, scenes: list[Scene]) -> Picture:
    """Picks one of `scenes` that does not satisfy the claims, half the time of the same category.

    Raises:
      ValueError: all of them satisfy the claims.
    """
    same = [other for other in scenes if other.category == scene.category]
    order = scenes if rng.random() < 0.5 else same
    shuffled = [order[i] for i in rng.permutation(len(order))]
    for other in [*shuffled, *scenes]:
        if not _satisfies(other, scene):
            return other
    raise ValueError(f"every scene satisfies {scene.caption!r}")


def near_miss(rng: np.random.Generator, scene: Scene) -> Picture:
    """Changes one thing in the scene's picture so that a claim no longer holds."""
    variants = [
        dataclasses.replace(scene, background=name)
        for name in BACKGROUNDS
        if name != scene.background
    ]
    if scene.word:
        fits = [text for text in WORDS if len(text) == len(scene.word.text)]
        words = [dataclasses.replace(scene.word, text=text) for text in fits]
        words += [dataclasses.replace(scene.word, color=color) for color in COLORS]
        variants += [dataclasses.replace(scene, word=word) for word in words]
    for i, thing in enumerate(scene.objects):
        before, after = scene.objects[:i], scene.objects[i + 1 :]
        variants += [
            dataclasses.replace(scene, objects=(*before, changed, *after))
            for changed in _changed(rng, thing, len(scene.objects))
        ]
        variants.append(dataclasses.replace(scene, objects=before + after))
    # Without the word, because mirrored objects could cover it.
    for axis in ("x", "y"):
        mirrored = [
            dataclasses.replace(thing, **{axis: 1 - getattr(thing, axis)})
            for thing in scene.objects
        ]
        variants.append(dataclasses.replace(scene, objects=tuple(mirrored), word=None))
    visible = [v for v in variants if casting.contrasts(v.background, _things(v))]
    misses = [v for v in visible if not _satisfies(v, scene)]
    return casting.pick(rng, misses)


def _changed(rng: np.random.Generator, thing: Thing, among: int) -> list[Thing]:
    changed = [dataclasses.replace(thing, color=color) for color in COLORS]
    changed += [dataclasses.replace(thing, shape=shape, texture="plain") for shape in SHAPES]
    if thing.shape in TEXTURED_SHAPES and thing.size != "small":
        changed += [dataclasses.replace(thing, texture=texture) for texture in TEXTURES]
    if thing.size == "large":
        radius = float(rng.uniform(*RADII[among]["normal"]))
        changed.append(dataclasses.replace(thing, size="normal", radius=radius))
    return changed


def _things(picture: Picture) -> list[Thing | Word]:
    return [*picture.objects, *([picture.word] if picture.word else [])]


def _satisfies(picture: Picture, scene: Scene) -> bool:
    return all(holds(claim, picture) for claim in scene.claims)


def define_flags() -> None:
    """Defines the flags only when run as a command: other commands have their own --num."""
    flags.DEFINE_integer("num", 1000, "Number of scenes to draw and check at each resolution.", 50)
    flags.DEFINE_enum("split", "validation", SPLITS, "Split to sample scenes from.")
    flags.DEFINE_integer("seed", 0, "Seed of the scenes.", 0)
    flags.DEFINE_list("resolutions", ["32", "64", "256"], "Image sides in pixels, 32 or more.")


def main(argv: list[str]) -> None:
    """Prints a table for each resolution."""
    del argv
    from data_pipelines.scenes.check import MIN_SIZE

    for text in flags.FLAGS.resolutions:
        if not text.isdecimal() or int(text) < MIN_SIZE:
            raise UserError(f"--resolutions has {text!r}; allowed: {MIN_SIZE} or more")
    rng = np.random.default_rng(flags.FLAGS.seed)
    scenes = [sample_scene(rng, flags.FLAGS.split) for _ in range(flags.FLAGS.num)]
    for resolution in map(int, flags.FLAGS.resolutions):
        print(f"{f'at {resolution} pixels':14}{'images':>9}{'right':>9}{'claims':>9}"
              f"{'wrong':>9}{'near misses':>13}{'ms/check':>10}")  # fmt: skip
        for category, score in sorted(measure(scenes, resolution, rng).items()):
            print(f"{category:14}{score}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
