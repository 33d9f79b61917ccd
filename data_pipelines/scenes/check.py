"""Checks which claims of a caption an image satisfies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.scenes.claims import holds, in_words
from data_pipelines.scenes.scene import Scene
from data_pipelines.scenes.see import see

MIN_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim of the caption, and whether the image satisfies it."""

    claim: dict
    ok: bool


def check(image: np.ndarray, scene: Scene) -> list[Verdict]:
    """Checks an image against the claims of a scene's caption; see `check_claims`."""
    return check_claims(image, scene.claims)


def check_claims(image: np.ndarray, claims: Sequence[dict]) -> list[Verdict]:
    """Checks which claims an image satisfies.

    Args:
      image: uint8 [S, S, 3] with S >= 32.
      claims: as in claims.py.

    Returns:
      A verdict for each claim, in order.

    Raises:
      ValueError: the image has another type or shape.
    """
    square = image.ndim == 3 and image.shape[0] == image.shape[1] >= MIN_SIZE
    if image.dtype != np.uint8 or not square or image.shape[2] != 3:
        raise ValueError(
            f"image is {image.dtype} {list(image.shape)}; allowed: uint8 [S, S, 3], S >= {MIN_SIZE}"
        )
    picture = see(image)
    return [Verdict(claim, holds(claim, picture)) for claim in claims]


def all_right(verdicts: Sequence[Verdict]) -> bool:
    """Returns whether the image satisfies every claim."""
    return all(verdict.ok for verdict in verdicts)


def check_example(image: np.ndarray, example: dict[str, Any]) -> tuple[list[str], list[bool]]:
    """Checks an image sampled for an example; has the signature that evaluation.alignment needs.

    Args:
      image: uint8 [S, S, 3] with S >= 32.
      example: a record with its category and scene (JSON).

    Returns:
      The groups that the example counts in (its category, and "one object" if the scene has one
      object and no word), and whether the image satisfies each claim.
    """
    scene = Scene.from_json(example["scene"])
    alone = len(scene.objects) == 1 and scene.word is None
    groups = [example["category"], *(["one object"] if alone else [])]
    return groups, [verdict.ok for verdict in check(image, scene)]


def verdicts(image: np.ndarray, example: dict[str, Any]) -> list[tuple[str, bool]]:
    """Returns each claim of an example's caption in words, and whether an image satisfies it."""
    found = check(image, Scene.from_json(example["scene"]))
    return [(in_words(verdict.claim), verdict.ok) for verdict in found]
