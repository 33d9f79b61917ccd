"""Quality against steps of the samplers, on a trained cascade, in one run.

    python -m benchmarks.samplers --workdir=runs/demo,runs/demo_sr

Without guidance or thresholding all deterministic samplers solve the same differential equation, so
how far a picture is from the one that very many steps give is a sampler's own error, whatever the
network is worth. Printed for each stage: root mean square of that error, in pixel values of 0 to
255, and seconds a picture; for every solver, spacing and number of evaluations of the network.
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
from imagen_jax.stage import batch_size, load

FLAGS = flags.FLAGS
SOLVERS = ("ddim", "dpmpp_2m", "heun")
EVALUATIONS = (8, 16, 32, 64)
REFERENCE_STEPS = 512


def define_flags() -> None:
    flags.DEFINE_list("workdir", None, "Runs of imagen_jax.train, in the order of the cascade.")
    flags.DEFINE_integer("num", 8, "Pictures that are drawn.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Measures, prints a table in Markdown for each stage."""
    del argv
    if not FLAGS.workdir:
        raise UserError("--workdir=DIR is needed (see --help)")
    seeds = np.arange(FLAGS.num, dtype=np.uint32)
    drawn = None
    for workdir in FLAGS.workdir:
        stage, params = load(Path(workdir).absolute())
        cond = _prompts(stage.config)
        if drawn is not None:
            cond["low_res"] = drawn
        draw = _sampler(stage, params, seeds, cond)
        drawn = draw(name="dpmpp_2m", num_steps=REFERENCE_STEPS)
        print(f"\n{Path(workdir).name}, {stage.config.full_size} pixels\n")
        print(_table(draw, drawn))


def _sampler(stage, params, seeds, cond) -> Callable[..., np.ndarray]:
    """A function of settings of the sampler; what they leave open is plain: no guidance."""
    plain = dataclasses.replace(
        stage.config.sampling, guidance_weight=1.0, threshold="none", spacing="log_snr"
    )
    size = batch_size(stage.config.full_size)
    return lambda **changes: stage.sample(
        params, seeds, cond, dataclasses.replace(plain, **changes), size
    )


def _prompts(config) -> dict[str, np.ndarray]:
    """The text of the first held-out captions."""
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader, stack_text

    return stack_text(Reader(config).examples(config.data.sample_split, FLAGS.num))


def _table(draw, reference: np.ndarray) -> str:
    head = " | ".join(f"{n} evaluations" for n in EVALUATIONS)
    lines = [f"| sampler, spacing | {head} | s a picture, at {EVALUATIONS[-1]} |"]
    lines.append("|---" * (len(EVALUATIONS) + 2) + "|")
    for name in SOLVERS:
        for spacing in ("t", "log_snr"):
            cells = []
            for evaluations in EVALUATIONS:
                # Heun evaluates the network twice at all steps but the first and the last.
                steps = evaluations // 2 + 1 if name == "heun" else evaluations
                images = draw(name=name, spacing=spacing, num_steps=steps)
                error = images.astype(float) - reference
                cells.append(f"{np.sqrt(np.mean(np.square(error))):.1f}")
            start = time.perf_counter()  # compiled by now
            draw(name=name, spacing=spacing, num_steps=steps)
            seconds = (time.perf_counter() - start) / len(reference)
            lines.append(f"| {name}, {spacing} | {' | '.join(cells)} | {seconds:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
