"""The scenes as a tfds dataset. A scene depends only on the seed, the split and its index."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from data_pipelines.records import dataset, writing
from data_pipelines.scenes.draw import render
from data_pipelines.scenes.grammar import CATEGORIES, nth_scene
from imagen_jax.common.errors import UserError

RESOLUTIONS = (32, 64, 256, 1024)


def scene_record(
    index: int,
    *,
    split: str,
    seed: int,
    resolution: int,
    encoder,
    categories: Sequence[str] = (),
) -> dict[str, Any] | dataset.Skip:
    """Makes a record of scene `index` of a split, the same scene at every resolution.

    Skips it if its caption is too long for the encoder.
    """
    scene = nth_scene(index, split, seed, categories)
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
    """Builds a dataset of scenes at one resolution.

    Args:
      resolution: one of RESOLUTIONS.
      counts: scenes in each of SPLITS.
      categories: categories of captions to draw; () is all.

    Raises:
      UserError: the grammar lacks one of `categories`.
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
            raise UserError(f"scenes have no category {min(unknown)!r}; allowed: {allowed}")
        settings = {"seed": seed, **{f"num_{split}": n for split, n in counts.items()}}
        if categories:
            settings["categories"] = list(categories)
        super().__init__(
            data_dir=data_dir,
            config=str(resolution),
            splits=lambda: {
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
    """Draws the scenes that a SeqIO task reads, unless they already exist.

    Args:
      task: scenes_ and one of RESOLUTIONS.
      data_dir: directory of the datasets.
      num_train: scenes in the train split; the other splits have 500 each.
      encoder, max_tokens: arguments of text.load_encoder.
      categories: categories of captions to draw; () is all.

    Raises:
      UserError: the task has no scenes, or different ones exist.
    """
    from imagen_jax.text import load_encoder  # imports JAX

    if not task.startswith("scenes_"):
        raise UserError(f"config.data.build is True, but data.task={task} has no scenes to draw")
    builder = Scenes(
        data_dir=data_dir,
        resolution=int(task.removeprefix("scenes_")),
        counts={"train": num_train, "validation": 500, "heldout": 500},
        seed=0,
        encoder=load_encoder(encoder, max_tokens),
        categories=categories,
    )
    writing.prepare(builder)
