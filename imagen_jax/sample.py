"""Samples prompts with the released model, a trained run, or a cascade of several.

    python -m imagen_jax.sample --prompts="a red circle;two blue stars"
    python -m imagen_jax.sample --workdir=runs/demo --prompts="a red circle"
    python -m imagen_jax.sample --workdir=runs/base64,runs/sr256,runs/sr1024 --prompts_file=p.txt

Flags marked "per stage" take one value, or one per workdir: --guidance=7,8,8. Run an interrupted
command again to continue it: images with the same prompt, seed and settings are kept.

Editing:
    vary an image                        --image and --strength
    repaint a part of an image           --image and --mask
    enlarge an image                     --image, with super-resolution workdirs only
    interpolate between two prompts      --frames and two prompts
    interpolate between two seeds        --frames, --seed and --to_seed
    super-resolve with another prompt    --sr_prompts, and --aug_level of about 0.3
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import check_folder

FLAGS = flags.FLAGS

NUM = 4  # samples per prompt

# Each is a setting of pipeline.settings.Settings, per stage.
STAGE_FLAGS = {
    "sampler": "ddim, ancestral, dpmpp_2m or heun",
    "steps": "Sampling steps",
    "spacing": "Space the steps evenly in t or in log_snr",
    "guidance": "Guidance weight; 1 turns guidance off",
    "guidance_rescale": "Guidance rescale, 0 to 1",
    "threshold": "Thresholding of the predicted image: none, static or dynamic",
    "aug_level": "Noise level of the low-resolution image, 0 to 1",
}


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    cli.define_cascade_flags(default="the model that ships with the package")
    flags.DEFINE_list(
        "ema",
        None,
        "Width (sigma_rel) of the weights' average to rebuild from the run's snapshots, such as "
        "0.05. Per stage (default: the EMA that training keeps).",
    )
    flags.DEFINE_string("prompts", "", "Prompts, separated by semicolons.")
    flags.DEFINE_string(
        "prompts_file", "", "Text file with one prompt per line, or .csv with a column 'prompt'."
    )
    flags.DEFINE_string("negative_prompt", "", "Prompt that guidance steers away from.")
    flags.DEFINE_string(
        "sr_prompts", "", "Prompts of the super-resolution stages: one, or as many as prompts."
    )
    flags.DEFINE_bool(
        "truncate_prompts", False, "Truncate prompts that are too long for the text encoder."
    )
    flags.DEFINE_string("out", "samples", "Directory for the images, or gs://; created if missing.")
    flags.DEFINE_integer("seed", 0, "Seed of a prompt's first sample; each further sample adds 1.")
    flags.DEFINE_integer("num", None, f"Number of samples per prompt (default: {NUM}).")
    flags.DEFINE_integer(
        "batch_size", 64, "Samples per batch at 64x64 pixels; larger images use fewer."
    )
    flags.DEFINE_bool("all_stages", False, "Also write the images of the other stages, by size.")
    flags.DEFINE_bool(
        "two_passes", False, "Run guidance's two passes one after the other: half the memory."
    )
    flags.DEFINE_list(
        "guidance_interval", None, "LOW,HIGH: apply guidance only between these log-SNRs."
    )
    for flag, help_text in STAGE_FLAGS.items():
        flags.DEFINE_list(flag, None, f"{help_text}. Per stage (default: the run's config).")
    flags.DEFINE_string(
        "image", None, "Image to edit or enlarge, cropped to its center square and resized."
    )
    flags.DEFINE_string(
        "mask", None, "Image with the aspect ratio of --image; its white part is repainted."
    )
    flags.DEFINE_integer(
        "resample", None, "With --mask: number of times to take each step (RePaint; default: 4)."
    )
    flags.DEFINE_float("strength", None, "With --image: how much may change, above 0 to 1.")
    flags.DEFINE_integer(
        "frames", 0, "Number of interpolation frames between two prompts or seeds."
    )
    flags.DEFINE_integer("to_seed", None, "With --frames: seed at the end of the interpolation.")
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Reads the flags, samples the prompts and writes the images."""
    del argv
    # Imported here so that --help and bad input answer at once.
    ema = cli.parse_numbers("ema", FLAGS.ema) if FLAGS.ema else None
    out = to_path(FLAGS.out)
    check_folder(out, "out")

    from imagen_jax.devices import compilation
    from imagen_jax.pipeline import cascade, prompts, writer
    from imagen_jax.pipeline.settings import SettingError, Settings
    from imagen_jax.runs import mirror

    compilation.use_cache(FLAGS.compilation_cache)
    texts = prompts.read_prompts(FLAGS.prompts, FLAGS.prompts_file)
    values = {field.name: FLAGS[field.name].value for field in dataclasses.fields(Settings)}
    if FLAGS.sr_prompts:
        values["sr_prompts"] = [p.strip() for p in FLAGS.sr_prompts.split(";")]
    if FLAGS.num is None and FLAGS.to_seed is None:
        values["num"] = NUM
    try:
        settings = Settings(**values)
        requests = prompts.make_requests(texts, settings)  # before the slow part, loading
        pipe = cascade.load(*(FLAGS.workdir or ()), step=FLAGS.step, ema=ema)
        job = pipe.prepare(requests, settings)
        columns = settings.frames or settings.num
        with mirror.results(out, "out") as folder:
            writer.write_samples(pipe, job, folder, columns=columns, all_stages=FLAGS.all_stages)
    except SettingError as e:
        raise UserError(f"--{e}") from e
    print(out / writer.GRID)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
