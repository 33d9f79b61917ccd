r"""Writes the scenes dataset at one resolution.

    python -m data_pipelines.scenes --data_dir=data --resolution=32 --num_train=20000

The same seed gives the same scenes at every resolution, so that the stages of a cascade can be
trained on the same pictures. The heldout split has combinations that the others never show.
"""

from __future__ import annotations

from absl import flags

from data_pipelines.records import writing
from data_pipelines.scenes.builder import RESOLUTIONS, SPLITS, Scenes
from imagen_jax.common import cli


def define_flags() -> None:
    resolutions = [str(r) for r in RESOLUTIONS]
    flags.DEFINE_enum("resolution", "32", resolutions, "Height and width of the images.")
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
