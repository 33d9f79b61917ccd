"""Samples held-out captions at several guidance weights, checks the images, and writes a report.

    python -m imagen_jax.evaluate --workdir=runs/demo --guidance=1,2,4

For models trained on the scenes: a program reads each image and decides which claims of its caption
hold. The workdir receives

    report.html                               the evaluation on one page
    evaluation/<metric>.json                  the figures of each metric, such as alignment
    evaluation/samples_guidance_<weight>.png  a grid of samples per guidance weight (and EMA width)
    evaluation/loss.png                       the losses against training time
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from imagen_jax.evaluation.metric import Example, Metric
    from imagen_jax.evaluation.report import Measured, Sampled

SHOWN = 32  # samples per grid

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    flags.DEFINE_string(
        "workdir", None, "Directory of the run (default: the run in runs/, if there is only one)."
    )
    flags.DEFINE_integer("step", None, "Checkpoint step to load (default: the newest).")
    flags.DEFINE_list("guidance", ["1", "2", "4"], "Guidance weights; 1 means no guidance.")
    flags.DEFINE_list(
        "ema",
        None,
        "Widths (sigma_rel) of the weights' average to rebuild from the run's snapshots and to "
        "evaluate, such as 0.02,0.05,0.1 (default: the EMA that training keeps).",
    )
    flags.DEFINE_integer("num", 128, "Number of captions to sample.", lower_bound=1)
    flags.DEFINE_string("split", "heldout", "Split that the captions come from.")
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of the first sample; each further sample adds 1.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Checks the flags and the workdir, then evaluates."""
    del argv
    weights = cli.parse_numbers("guidance", FLAGS.guidance)
    widths = cli.parse_numbers("ema", FLAGS.ema) if FLAGS.ema else [None]

    # Later imports are in the functions that use them, so that bad input is reported before JAX and
    # TensorFlow are imported.
    from imagen_jax.runs import workdir as runs

    workdir = FLAGS.workdir or runs.only_run()
    runs.check_run(workdir)

    from imagen_jax.devices import compilation

    compilation.use_cache(FLAGS.compilation_cache)
    workdir = Path(workdir).absolute()
    evaluate(workdir, weights, FLAGS.split, FLAGS.num, FLAGS.seed, FLAGS.step, widths)


def evaluate(
    workdir: Path,
    weights: list[float],
    split: str,
    num: int,
    seed: int = 0,
    step: int | None = None,
    widths: Sequence[float | None] = (None,),
) -> None:
    """Samples `num` captions of a split at each guidance weight, checks the images, and reports.

    Args:
      widths: widths of post-hoc EMA, each sampled at each guidance weight; None is the EMA that
        training keeps.
    """
    import numpy as np
    from tqdm import tqdm

    from data_pipelines.reading.check import check_dataset
    from imagen_jax.common.files import make_folder
    from imagen_jax.diffusion.conditioning import stack_text
    from imagen_jax.evaluation.report import TRUE, Measured
    from imagen_jax.runs import workdir as runs
    from imagen_jax.runs.posthoc import rebuild_ema
    from imagen_jax.stage import load

    config = runs.read_config(workdir)
    if not config.data.task.startswith("scenes"):
        raise UserError(
            f"config.data.task is {config.data.task!r}; only scenes can be evaluated, because a "
            "program checks them"
        )
    make_folder(workdir / runs.EVALUATION, "workdir")
    check_dataset(config)
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    prompts = Reader(config).examples(split, num)
    stage, params = load(workdir, step, widths[0])
    cond = stack_text(prompts)
    seeds = np.arange(len(prompts), dtype=np.uint32) + np.uint32(seed)
    samples = {}
    total = len(prompts) * len(weights) * len(widths)
    with tqdm(total=total, desc="sampling", unit="image") as bar:
        for i, width in enumerate(widths):
            if i > 0:
                params = rebuild_ema(workdir, config, stage.abstract_params, width, step)
            for weight in weights:
                name = str(weight) if width is None else f"{weight}, EMA {width:g}"
                sampler = dataclasses.replace(config.sampling, guidance_weight=weight)
                samples[name] = stage.sample(params, seeds, cond, sampler, progress=bar.update)
    columns = dict(samples)
    columns[TRUE] = [p["image"] for p in prompts]
    results = {
        name: Measured(metric, {c: metric.measure(i, prompts) for c, i in columns.items()})
        for name, metric in metrics().items()
    }
    # The report shows the claims at the weight nearest to the config's, for the first width.
    nearest = min(weights, key=lambda w: abs(w - config.sampling.guidance_weight))
    judged = list(samples)[weights.index(nearest)]
    write(workdir, split, samples, sampled(prompts, columns, judged), results)


def metrics() -> dict[str, Metric]:
    """Returns the metrics by name. A new one takes a module in evaluation/ and a line here."""
    from data_pipelines.scenes.check import check_example
    from imagen_jax.evaluation import alignment

    return {"alignment": alignment.metric(check_example)}


def sampled(
    prompts: Sequence[Example], columns: Mapping[str, Sequence[np.ndarray]], judged: str
) -> list[Sampled]:
    """Joins each caption with its images, and with the verdicts on the image of one column."""
    from data_pipelines.scenes.check import verdicts
    from imagen_jax.evaluation.report import Sampled

    return [
        Sampled(
            prompt["caption"],
            {column: images[i] for column, images in columns.items()},
            {judged: verdicts(columns[judged][i], prompt)},
        )
        for i, prompt in enumerate(prompts)
    ]


def write(
    workdir: Path,
    split: str,
    samples: Mapping[str, np.ndarray],
    shown: Sequence[Sampled],
    results: Mapping[str, Measured],
) -> None:
    """Writes the files of an evaluation; prints the tables of the metrics and the files' names."""
    from imagen_jax.common import pictures
    from imagen_jax.common.files import write_json
    from imagen_jax.evaluation import report
    from imagen_jax.runs import workdir as runs

    folder = workdir / runs.EVALUATION
    for name, measured in results.items():
        write_json(folder / f"{name}.json", {"split": split, "guidance": measured.tables})
    captions = [s.caption for s in shown[:SHOWN]]
    sheets = []
    for column, images in samples.items():
        name = report.title(column).replace(", ", "_").replace(" ", "_")
        sheets.append(folder / f"samples_{name}.png")
        pictures.save(pictures.grid(images[:SHOWN], captions, columns=8), sheets[-1])
    page = report.write(workdir, shown, list(results.values()))
    for measured in results.values():
        print(report.text_table(measured))
    for path in (*sheets, page):
        print(path)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
