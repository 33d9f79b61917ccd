"""The scenes as a tfds dataset: the scene of an index depends on the seed and the split alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds

from data_pipelines.records import dataset, writing
from data_pipelines.scenes.draw import render
from data_pipelines.scenes.grammar import CATEGORIES, sample_scene
from imagen_jax.common.errors import UserError

RESOLUTIONS = (32, 64, 256, 1024)
SPLITS = ("train", "validation", "heldout")


def scene_record(
    index: int,
    *,
    split: str,
    seed: int,
    resolution: int,
    encoder,
    categories: Sequence[str] = (),
) -> dict[str, Any] | dataset.Skip:
    """Scene `index` of a split as a record; at every resolution it is the same scene.

    One whose caption is longer than the encoder takes is skipped.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = sample_scene(rng, split, categories)
    name = f"{split}-{index:06d}"
    if encoder.num_tokens(scene.caption) > encoder.max_tokens:
        return dataset.Skip(name, f"caption longer than --max_tokens={encoder.max_tokens}")
    return {
        "id": name,
        "image": dataset.png_bytes(render(scene, resolution)),
        "caption": scene.caption,
        "category": scene.category,
        "scene": scene.to_json(),
    }


class Scenes(dataset.RecordsBuilder):
    """Scenes at one of RESOLUTIONS; `counts` gives the number of each of SPLITS.

    Raises:
      UserError: one of `categories` is not the grammar's. () is all of them.
    """

    BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=str(r)) for r in RESOLUTIONS]

    def __init__(
        self,
        *,
        data_dir: str,
        resolution: int,
        counts: Mapping[str, int],
        seed: int,
        encoder,
        categories: Sequence[str] = (),
    ):
        if unknown := set(categories) - set(CATEGORIES):
            allowed = ", ".join(CATEGORIES)
            raise UserError(f"a category of scenes is {min(unknown)!r}; allowed: {allowed}")
        settings = {"seed": seed, **{f"num_{split}": n for split, n in counts.items()}}
        if categories:
            settings["categories"] = list(categories)
        super().__init__(
            data_dir=data_dir,
            config=str(resolution),
            splits={
                split: dataset.Split(
                    range(count),
                    functools.partial(
                        scene_record,
                        split=split,
                        seed=seed,
                        resolution=resolution,
                        encoder=encoder,
                        categories=categories,
                    ),
                )
                for split, count in counts.items()
                if count
            },
            encoder=encoder,
            settings=settings,
        )


def prepare(
    task: str,
    data_dir: str,
    num_train: int,
    encoder: str,
    max_tokens: int,
    categories: Sequence[str] = (),
) -> None:
    """Writes the scenes that a SeqIO task reads, or finds them already written.

    Args:
      task: scenes_ with one of RESOLUTIONS.
      data_dir: the folder that holds datasets.
      num_train: scenes of the train split; the others have 500 each.
      encoder, max_tokens: as text.load_encoder takes them.
      categories: of captions; () is all.

    Raises:
      UserError: the task is not one of scenes, or other scenes are there.
    """
    from imagen_jax.text import load_encoder  # imports JAX

    if not task.startswith("scenes_"):
        raise UserError(f"config.data.build is True; data.task={task} is not a scenes task")
    builder = Scenes(
        data_dir=data_dir,
        resolution=int(task.removeprefix("scenes_")),
        counts={"train": num_train, "validation": 500, "heldout": 500},
        seed=0,
        encoder=load_encoder(encoder, max_tokens),
        categories=categories,
    )
    writing.prepare(builder)
