"""Draws prompts with a trained run, or with a whole cascade of them.

    python -m imagen_jax.sample --workdir=runs/demo --prompts="a red circle;two blue stars"
    python -m imagen_jax.sample --workdir=runs/base64,runs/sr256,runs/sr1024 --prompts_file=p.txt

Flags that say "a stage" take one value, or one for each workdir: --guidance=7,8,8. A call that was
interrupted goes on where it stopped: what is there already, with the same prompt, seed and
settings, is not drawn again.

Editing: --image with --strength draws a variation of a picture, --image with --mask paints a part
of it anew, --image with a super-resolution workdir enlarges it; --frames draws the way from one
prompt to another, or with --to_seed from one seed to another; --sr_prompts has the super-resolution
stages draw another prompt than the base (with --aug_level of about 0.3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.devices import compilation
from imagen_jax.pipeline import cascade, prompts
from imagen_jax.pipeline.cascade import TrainedStage
from imagen_jax.pipeline.prompts import Request
from imagen_jax.pipeline.writer import write_samples
from imagen_jax.runs.workdir import newest_step
from imagen_jax.stage import batch_size, load

FLAGS = flags.FLAGS

# Flags that change a stage's config section `sampling`: the flag, the key, the type, its help.
STAGE_FLAGS = (
    ("sampler", "name", str, "ddim, ancestral, dpmpp_2m or heun."),
    ("steps", "num_steps", int, "Sampling steps."),
    ("spacing", "spacing", str, "What the steps are evenly spaced in: t or log_snr."),
    ("guidance", "guidance_weight", float, "Guidance weight; 1 is none."),
    ("guidance_rescale", "guidance_rescale", float, "Guidance rescale, 0 to 1."),
    ("threshold", "threshold", str, "none, static or dynamic."),
    ("aug_level", "aug_level", float, "Noise on the low-resolution image, 0 to 1."),
)


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    flags.DEFINE_list("workdir", None, "Runs of imagen_jax.train, in the order of the cascade.")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
    flags.DEFINE_string("prompts", "", "Prompts, separated by semicolons.")
    flags.DEFINE_string("prompts_file", "", "A prompt a line, or a .csv with a column 'prompt'.")
    flags.DEFINE_string("negative_prompt", "", "What guidance is to lead away from.")
    flags.DEFINE_string("sr_prompts", "", "What super-resolution is to draw; one, or as many.")
    flags.DEFINE_string("out", "samples", "Folder for the pictures.")
    flags.DEFINE_integer("seed", 0, "Seed of a prompt's first sample; the next counts on.", 0)
    flags.DEFINE_integer("num", 4, "Samples a prompt.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 64, "Drawn at once at 64x64; fewer when larger.", 1)
    flags.DEFINE_bool("all_stages", False, "Keep and show what every stage drew, by size.")
    flags.DEFINE_bool("two_passes", False, "Guidance in two passes instead of one: less memory.")
    flags.DEFINE_list("guidance_interval", None, "LOW,HIGH: log-SNRs between which guidance acts.")
    for flag, _, _, help_text in STAGE_FLAGS:
        flags.DEFINE_list(flag, None, f"{help_text} A stage; the config's by default.")
    flags.DEFINE_string("image", "", "Picture to edit, or to enlarge: PNG, RGB, of the right size.")
    flags.DEFINE_string("mask", "", "Black and white PNG: white is painted anew (inpainting).")
    flags.DEFINE_integer("resample", 4, "With --mask: how often each step is taken (RePaint).", 1)
    flags.DEFINE_float("strength", 1.0, "With --image: 0 to 1, how much of it may change.")
    flags.DEFINE_integer("frames", 0, "Draw the way between two prompts or seeds in so many.", 0)
    flags.DEFINE_integer("to_seed", None, "With --frames: the seed at the end of the way.")
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Parses flags, draws, writes."""
    del argv
    compilation.use_cache(FLAGS.compilation_cache)
    if not FLAGS.workdir:
        raise UserError("--workdir=DIR is needed (see --help)")
    requests = read_requests()
    stages = [load_stage(i, Path(w)) for i, w in enumerate(FLAGS.workdir)]
    check_flags(stages)
    given = read_given(stages)
    cascade.check_order(stages, stages[0].low_res if "low_res" in given else None)
    write_samples(
        stages,
        requests,
        given,
        Path(FLAGS.out),
        columns=FLAGS.frames or FLAGS.num,
        all_stages=FLAGS.all_stages,
    )


def read_requests() -> list[Request]:
    """What the flags ask to draw."""
    found = prompts.read_prompts(FLAGS.prompts, FLAGS.prompts_file)
    others = [p.strip() for p in FLAGS.sr_prompts.split(";")] if FLAGS.sr_prompts else []
    # The way from one seed to another is a single one.
    num = 1 if FLAGS.to_seed is not None else FLAGS.num
    seeds = range(FLAGS.seed, FLAGS.seed + num)
    more = (FLAGS.negative_prompt, FLAGS.frames, FLAGS.to_seed)
    return prompts.make_requests(found, others, seeds, *more)


def load_stage(index: int, workdir: Path) -> TrainedStage:
    """The stage of one workdir, with the settings that the flags give it."""
    changes: dict[str, Any] = {"guidance_batched": not FLAGS.two_passes}
    for flag, key, kind, _ in STAGE_FLAGS:
        values = FLAGS[flag].value
        if values is None:
            continue
        if len(values) not in (1, len(FLAGS.workdir)):
            allowed = f"1, or one for each of {len(FLAGS.workdir)} workdirs"
            raise UserError(f"--{flag} has {len(values)} values; allowed: {allowed}")
        changes[key] = _number(flag, values[index % len(values)], kind)
    if FLAGS.guidance_interval is not None:
        bounds = [_number("guidance_interval", v, float) for v in FLAGS.guidance_interval]
        changes["guidance_interval"] = tuple(bounds)
    if FLAGS.mask:
        changes["resample"] = FLAGS.resample
    elif index == 0 and FLAGS.image:
        changes["strength"] = FLAGS.strength
    step = newest_step(workdir) if FLAGS.step is None else FLAGS.step
    stage, params = load(workdir, step)
    sampler = dataclasses.replace(stage.config.sampling, **changes)
    size = batch_size(stage.config.full_size, FLAGS.batch_size)
    return TrainedStage(str(workdir), step, stage, params, sampler, size)


def _number(flag: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError as e:
        raise UserError(f"--{flag} is {text!r}; it must be of type {kind.__name__}") from e


def check_flags(stages: list[TrainedStage]) -> None:
    """Raises UserError for a flag that was given but would change nothing."""
    kinds = {bool(stage.low_res) for stage in stages}
    edits = bool(FLAGS.image) and not stages[0].low_res
    first = "and a base model as the first --workdir"
    guided = any(stage.sampler.guidance_weight != 1 for stage in stages), "--guidance other than 1"
    table = {
        "mask": (edits, f"--image, {first}"),
        "strength": (edits and not FLAGS.mask, f"--image, no --mask, {first}"),
        "resample": (bool(FLAGS.mask), "--mask"),
        "to_seed": (not edits, "no --image, unless it is to be enlarged"),
        "num": (FLAGS.to_seed is None, "no --to_seed, which draws one way"),
        "sr_prompts": (kinds == {True, False}, "a base and a super-resolution --workdir"),
        "aug_level": (True in kinds, "a super-resolution --workdir"),
        "negative_prompt": guided,
        "guidance_interval": guided,
        "guidance_rescale": guided,
    }
    for flag, (used, needs) in table.items():
        if FLAGS[flag].present and not used:
            raise UserError(f"{FLAGS[flag].serialize()} needs {needs}")


def read_given(stages: list[TrainedStage]) -> dict[str, np.ndarray]:
    """What --image and --mask give: low_res to enlarge, or image (and mask) at the last size."""
    if not FLAGS.image:
        return {}
    if stages[0].low_res:
        return {"low_res": prompts.read_image("--image", FLAGS.image, stages[0].low_res)}
    size = stages[-1].size
    given = {"image": prompts.read_image("--image", FLAGS.image, size)}
    if FLAGS.mask:
        given["mask"] = prompts.read_mask("--mask", FLAGS.mask, size)
    elif FLAGS.strength == 1.0:
        raise UserError(f"--image={FLAGS.image} needs --strength below 1 (try 0.6), or --mask")
    return given


if __name__ == "__main__":
    define_flags()
    cli.run(main)
