"""Measures the error of each sampler against its number of evaluations, on a trained cascade.

    python -m benchmarks.samplers --workdir=runs/demo,runs/demo_sr

Without guidance and thresholding all deterministic samplers solve the same differential equation,
so the distance to a sample of very many steps is the sampler's own error, however good the network
is. For each stage the command prints a Markdown table: the root mean square of this error in gray
levels (0 to 255) for every solver, spacing and number of evaluations, and seconds per image.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.diffusion.conditioning import stack_text
from imagen_jax.stage import batch_size, load

FLAGS = flags.FLAGS
SOLVERS = ("ddim", "dpmpp_2m", "heun")
EVALUATIONS = (8, 16, 32, 64)
REFERENCE_STEPS = 512


def define_flags() -> None:
    flags.DEFINE_list("workdir", None, "Run directories, in the order of the cascade.")
    flags.DEFINE_integer("num", 8, "Number of images to sample.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Samples with every setting and prints one table per stage."""
    del argv
    if not FLAGS.workdir:
        raise UserError("--workdir=DIR is needed (see --help)")
    seeds = np.arange(FLAGS.num, dtype=np.uint32)
    reference = None
    for workdir in FLAGS.workdir:
        stage, params = load(Path(workdir).absolute())
        cond = _prompts(stage.config)
        if reference is not None:
            cond["low_res"] = reference
        sample = _sampler(stage, params, seeds, cond)
        reference = sample(name="dpmpp_2m", num_steps=REFERENCE_STEPS)
        print(f"\n{Path(workdir).name}, {stage.config.full_size} pixels\n")
        print(_table(sample, reference))


def _sampler(stage, params, seeds, cond) -> Callable[..., np.ndarray]:
    """Returns a function that samples with changed settings; without guidance or thresholding."""
    plain = dataclasses.replace(
        stage.config.sampling, guidance_weight=1.0, threshold="none", spacing="log_snr"
    )
    size = batch_size(stage.config.full_size)
    return lambda **changes: stage.sample(
        params, seeds, cond, dataclasses.replace(plain, **changes), size
    )


def _prompts(config) -> dict[str, np.ndarray]:
    """Returns the text embeddings of the first held-out captions."""
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    return stack_text(Reader(config).examples(config.data.sample_split, FLAGS.num))


def _table(sample, reference: np.ndarray) -> str:
    head = " | ".join(f"{n} evaluations" for n in EVALUATIONS)
    lines = [f"| sampler, spacing | {head} | s per image, at {EVALUATIONS[-1]} |"]
    lines.append("|---" * (len(EVALUATIONS) + 2) + "|")
    for name in SOLVERS:
        for spacing in ("t", "log_snr"):
            cells = []
            for evaluations in EVALUATIONS:
                # Heun evaluates the network twice at every step except the first and the last.
                steps = evaluations // 2 + 1 if name == "heun" else evaluations
                images = sample(name=name, spacing=spacing, num_steps=steps)
                error = images.astype(float) - reference
                cells.append(f"{np.sqrt(np.mean(np.square(error))):.1f}")
            start = time.perf_counter()  # already compiled
            sample(name=name, spacing=spacing, num_steps=steps)
            seconds = (time.perf_counter() - start) / len(reference)
            lines.append(f"| {name}, {spacing} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
