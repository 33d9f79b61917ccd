"""Checks which claims of a caption a picture satisfies."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_pipelines.scenes.claims import holds
from data_pipelines.scenes.scene import Scene
from data_pipelines.scenes.see import see

MIN_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim of the caption, and whether the picture satisfies it."""

    claim: dict
    ok: bool


def check(image: np.ndarray, scene: Scene) -> list[Verdict]:
    """Checks a picture against the claims of a scene's caption.

    Args:
      image: uint8 [S, S, 3] with S >= 32.
      scene: gives the claims; its layout is not used.

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
    return [Verdict(claim, holds(claim, picture)) for claim in scene.claims]


def all_right(verdicts: Sequence[Verdict]) -> bool:
    """Returns whether the picture satisfies every claim."""
    return all(verdict.ok for verdict in verdicts)


def check_example(image: np.ndarray, example: dict[str, Any]) -> tuple[list[str], list[bool]]:
    """Checks a picture sampled for an example, as evaluation.alignment wants it.

    Args:
        image: uint8 [S, S, 3] with S >= 32.
        example: a record with its category and scene (JSON).

    Returns:
        The groups that the example counts in (its category, and "one object" if the scene has one
        object and no word), and whether the picture satisfies each claim.
    """
    scene = Scene.from_json(example["scene"])
    alone = len(scene.objects) == 1 and scene.word is None
    groups = [example["category"], *(["one object"] if alone else [])]
    return groups, [verdict.ok for verdict in check(image, scene)]
