r"""Draws the scenes dataset at one resolution.

    python -m data_pipelines.scenes --data_dir=data --resolution=32 --num_train=20000

A seed gives the same scenes at every resolution, so all stages of a cascade can train on the same
scenes. The heldout split has pairs of shape and color that the other splits never show.
"""

from __future__ import annotations

from absl import flags

from data_pipelines.records import writing
from data_pipelines.scenes.builder import RESOLUTIONS, Scenes
from data_pipelines.scenes.vocabulary import SPLITS
from imagen_jax.common import cli


def define_flags() -> None:
    resolutions = [str(r) for r in RESOLUTIONS]
    flags.DEFINE_enum("resolution", "32", resolutions, "Side of the images in pixels.")
    for split, default in zip(SPLITS, (20_000, 500, 500), strict=True):
        flags.DEFINE_integer(
            f"num_{split}", default, f"Scenes in the {split} split.", int(split == "train")
        )
    flags.adopt_module_key_flags(writing)


def main(argv: list[str]) -> None:
    del argv
    builder = Scenes(
        data_dir=flags.FLAGS.data_dir,
        resolution=int(flags.FLAGS.resolution),
        counts={split: flags.FLAGS[f"num_{split}"].value for split in SPLITS},
        seed=flags.FLAGS.seed,
        encoder=writing.encoder_from_flags(),
    )
    writing.prepare(builder, overwrite=flags.FLAGS.overwrite)


if __name__ == "__main__":
    writing.define_flags()
    define_flags()
    cli.run(main)
