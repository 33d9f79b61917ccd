"""Draws held-out captions at several guidance weights, checks the pictures, and writes a report.

    python -m imagen_jax.evaluate --workdir=runs/demo --guidance=1,3,5

For models trained on the scenes: a program reads each picture and says which claims of its caption
it satisfies. Writes evaluation/alignment.json, evaluation/samples.png and report.html into the
workdir.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import flags
from tqdm import tqdm

from imagen_jax.common import cli, pictures
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_text
from imagen_jax.devices import compilation
from imagen_jax.evaluation import report
from imagen_jax.evaluation.alignment import alignment
from imagen_jax.stage import load

SHOWN = 32


FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    flags.DEFINE_string("workdir", None, "A run of imagen_jax.train.")
    flags.DEFINE_integer("step", None, "Which checkpoint; the newest by default.")
    flags.DEFINE_list("guidance", ["1", "3", "5"], "Guidance weights, 1 is none.")
    flags.DEFINE_integer("num", 128, "How many held-out captions to draw.", lower_bound=1)
    flags.DEFINE_string("split", "heldout", "The split whose captions are drawn.")
    flags.DEFINE_integer("seed", 0, "Seed of the first sample; the next counts on.")
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Parses flags, then evaluates."""
    del argv
    compilation.use_cache(FLAGS.compilation_cache)
    if not FLAGS.workdir:
        raise UserError("--workdir=DIR is needed (see --help)")
    workdir = Path(FLAGS.workdir).absolute()
    try:
        weights = [float(w) for w in FLAGS.guidance]
    except ValueError:
        weights = []
    if not weights or any(w < 0 or not math.isfinite(w) for w in weights):
        raise UserError(f"--guidance is {','.join(FLAGS.guidance)!r}; allowed: numbers from 0 up")
    evaluate(workdir, weights, FLAGS.split, FLAGS.num, FLAGS.seed, FLAGS.step)


def evaluate(
    workdir: Path,
    weights: list[float],
    split: str,
    num: int,
    seed: int = 0,
    step: int | None = None,
) -> None:
    """Draws `num` captions of a split at each guidance weight, checks the pictures, and reports."""
    stage, params = load(workdir, step)
    with cli.quiet_imports():  # TensorFlow takes long; a wrong workdir should fail before it
        from data_pipelines.reading.reader import Reader, stack_text
        from data_pipelines.scenes.check import check_example

    if not stage.config.data.task.startswith("scenes"):
        raise UserError(
            f"config.data.task is {stage.config.data.task!r}; alignment can be checked for scenes"
        )
    prompts = Reader(stage.config).examples(split, num)
    cond = stack_text(prompts)
    seeds = np.arange(len(prompts), dtype=np.uint32) + np.uint32(seed)
    samples, rows = {}, {}
    with tqdm(total=len(prompts) * len(weights), desc="drawing", unit="image") as bar:
        for weight in weights:
            sampler = dataclasses.replace(stage.config.sampling, guidance_weight=weight)
            samples[weight] = stage.sample(params, seeds, cond, sampler, progress=bar.update)
            rows[weight] = alignment(samples[weight], prompts, check_example)
    rows["true renders"] = alignment([p["image"] for p in prompts], prompts, check_example)

    folder = workdir / "evaluation"
    folder.mkdir(exist_ok=True)
    table = {str(name): table for name, table in rows.items()}
    write_text(
        folder / "alignment.json", json.dumps({"split": split, "guidance": table}, indent=2) + "\n"
    )
    captions = [p["caption"] for p in prompts[:SHOWN]]
    sheets = {}
    for weight, images in samples.items():
        sheets[f"guidance {weight:g}"] = folder / f"samples_guidance_{weight:g}.png"
        sheet = pictures.grid(images[:SHOWN], captions, columns=8)
        pictures.save(sheet, sheets[f"guidance {weight:g}"])
    page = report.write(workdir, sheets, table)
    print(report.text_table(table))
    for path in (*sheets.values(), page):
        print(path)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
