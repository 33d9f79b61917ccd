r"""Samples prompts at several settings, measures the images, and writes a report.

    python -m imagen_jax.evaluate --workdir=runs/demo --guidance=1,2,4
    python -m imagen_jax.evaluate --workdir=runs/base,runs/sr --prompts=drawbench.csv \
        --judge=http://localhost:8000/v1 --judge_model=qwen2-vl
    python -m imagen_jax.evaluate --compare=runs/a/evaluation/alignment.json,runs/b/...

The last workdir (or --out) receives

    report.html                               the evaluation on one page
    evaluation/<metric>.json                  the figures of each metric with their protocol
    evaluation/sweep.csv, sweep.json          one row per setting
    evaluation/samples_guidance_<weight>.png  a grid of samples per setting; and other pictures
    evaluation/samples/                       the samples; run an interrupted command again

docs/evaluation.md explains suites, metrics, judges, sweeps and comparisons.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import UserError

if TYPE_CHECKING:
    from imagen_jax.config import Config
    from imagen_jax.evaluation.evaluating import Evaluation
    from imagen_jax.evaluation.suites import Suite

NUM = 128  # prompts of a dataset or of drawn scenes
SCENES = "scenes"  # --prompts that are drawn

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    cli.define_cascade_flags()
    flags.DEFINE_list(
        "guidance",
        None,
        "Guidance weights; 1 means no guidance. Per stage: 1.35/8 (default: 1,2,4, or with --sweep "
        "the run's config).",
    )
    flags.DEFINE_list(
        "ema",
        None,
        "Widths (sigma_rel) of the weights' average to rebuild from the run's snapshots and to "
        "evaluate, such as 0.02,0.05,0.1 (default: the EMA that training keeps).",
    )
    flags.DEFINE_multi_string(
        "sweep",
        [],
        "NAME:VALUE,VALUE: evaluate all combinations with the other sweeps. NAME is guidance, "
        "threshold, steps, sampler, spacing, guidance_rescale, aug_level, ema or low_res.",
    )
    flags.DEFINE_string(
        "prompts",
        "",
        "File or folder of a suite (DrawBench, PartiPrompts, COCO, GenEval, GenEval 2, DPG-Bench, "
        f"DSG, TIFA, or a prompt a line), or {SCENES}, which are drawn (default: captions of "
        "--split of the run's dataset).",
    )
    flags.DEFINE_integer(
        "prompts_seed", 0, "Seed that draws COCO's captions and scenes.", lower_bound=0
    )
    flags.DEFINE_string(
        "questions", "", "File with questions to the prompts: DSG, TIFA, GenEval 2."
    )
    flags.DEFINE_integer(
        "num", None, f"Number of prompts (default: {NUM}; all of a suite).", lower_bound=1
    )
    flags.DEFINE_string("split", "heldout", "Split that the captions come from.")
    flags.DEFINE_integer(
        "seed",
        0,
        "Seed of the first sample; each further sample adds 1.",
        lower_bound=0,
        upper_bound=2**32 - 1,
    )
    flags.DEFINE_list(
        "metrics",
        None,
        "alignment, questions, word_accuracy, losses, fid and others (docs/evaluation.md; default: "
        "alignment for scenes, questions with --judge).",
    )
    flags.DEFINE_string("metric_weights", "", "Folder of the weights of image metrics.")
    flags.DEFINE_string("reference", "", "Images or statistics that image metrics compare with.")
    flags.DEFINE_string(
        "judge", "", "Address of a vision model of OpenAI's kind, such as http://localhost:8000/v1."
    )
    flags.DEFINE_string("judge_model", "", "The judge's name of its model.")
    flags.DEFINE_bool(
        "truncate_prompts", False, "Truncate prompts that are too long for the text encoder."
    )
    flags.DEFINE_string(
        "out", "", "Folder of the results, or gs:// (default: evaluation/ in the workdir)."
    )
    flags.DEFINE_list(
        "compare",
        None,
        "Two results of the same metric to compare, A.json,B.json; samples nothing.",
    )
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Checks the flags, the workdirs and the suite, then evaluates or compares."""
    del argv
    # Later imports are in the functions that use them, so that bad input is reported before JAX and
    # TensorFlow are imported.
    from imagen_jax.evaluation import suites, sweep, table
    from imagen_jax.runs import workdir as runs

    if FLAGS.compare:
        compare(FLAGS.compare)
        return
    settings = sweep.parse(FLAGS.sweep)
    for flag in ("ema", "guidance"):
        values = FLAGS[flag].value
        if flag == "guidance" and values is None and not settings:
            values = ["1", "2", "4"]
        if values is not None:
            if flag in settings:
                raise UserError(f"--{flag} and --sweep={flag} are both set; give one of them")
            settings = {flag: sweep.parse_values(flag, values, f"--{flag}"), **settings}
    if FLAGS.judge and not FLAGS.judge_model:
        raise UserError(f"--judge={FLAGS.judge} needs --judge_model, the name of its model")
    table.check_names(FLAGS.metrics or (), FLAGS.judge)
    workdirs = FLAGS.workdir or [runs.only_run()]
    for workdir in workdirs:
        runs.check_run(workdir)
    suite = None
    if FLAGS.prompts and FLAGS.prompts != SCENES:
        suite = suites.read(Path(FLAGS.prompts), FLAGS.num, FLAGS.prompts_seed)
    if FLAGS.questions:
        if suite is None:
            raise UserError(f"--questions={FLAGS.questions} needs --prompts=FILE")
        suite = suites.with_questions(suite, Path(FLAGS.questions))

    from imagen_jax.devices import compilation

    compilation.use_cache(FLAGS.compilation_cache)
    out = to_path(FLAGS.out or to_path(workdirs[-1]) / runs.EVALUATION, absolute=True)
    evaluate(
        [to_path(w, absolute=True) for w in runs.stages_of(workdirs)],
        settings,
        suite=suite,
        scenes=FLAGS.prompts == SCENES,
        split=FLAGS.split,
        num=FLAGS.num,
        prompts_seed=FLAGS.prompts_seed,
        seed=FLAGS.seed,
        step=FLAGS.step,
        metrics=FLAGS.metrics or (),
        truncate=FLAGS.truncate_prompts,
        out=out,
        sources={
            "judge": FLAGS.judge,
            "judge_model": FLAGS.judge_model,
            "weights": Path(FLAGS.metric_weights) if FLAGS.metric_weights else None,
            "reference": Path(FLAGS.reference) if FLAGS.reference else None,
        },
    )


def compare(files: Sequence[str]) -> None:
    """Prints the difference of two results with its interval."""
    from imagen_jax.evaluation import protocol

    if len(files) != 2:
        raise UserError(f"--compare is {','.join(files)!r}; allowed: two files, A.json,B.json")
    print("\n".join(protocol.compare(*map(to_path, files))))


def evaluate(
    workdirs: Sequence[Path],
    settings: Mapping[str, list[str]],
    *,
    out: Path,
    suite: Suite | None = None,
    scenes: bool = False,
    split: str = "heldout",
    num: int | None = None,
    prompts_seed: int = 0,
    seed: int = 0,
    step: int | None = None,
    metrics: Sequence[str] = (),
    truncate: bool = False,
    sources: Mapping[str, Any] = {},
) -> None:
    """Samples the prompts at every point of the sweep, measures the images, and reports.

    Args:
      workdirs: the runs of a cascade, in order.
      settings: what is swept, see evaluation.sweep.
      out: folder of the results.
      suite: the prompts; None for the captions of `split`, or for scenes that are drawn.
      metrics: names of metrics; () chooses what suits the prompts.
      sources: fields of evaluation.table.Sources.
    """
    from imagen_jax.common.files import make_folder
    from imagen_jax.evaluation.evaluating import Evaluation
    from imagen_jax.runs import mirror
    from imagen_jax.runs import workdir as runs

    config = runs.read_config(workdirs[-1])
    make_folder(out, "out")
    parts = ()
    if suite is None and scenes:
        suite = scenes_suite(config, split, num or NUM, prompts_seed)
    elif suite is None:
        suite, parts = split_suite(config, split, num), config.text.parts
    beside = out == workdirs[-1] / runs.EVALUATION
    page = (workdirs[-1] if beside else out) / runs.REPORT

    def examples_of(config: Config) -> Sequence[Any]:
        return split_suite(config, split, num, full=False).examples

    with mirror.results(out, "out") as folder:
        job = Evaluation(workdirs, dict(settings), suite, seed, folder, step, truncate, parts)
        files = measure(job, config, metrics, sources, examples_of, page)
    for path in files:
        print(path if path == page else out / path.relative_to(folder))


def measure(
    job: Evaluation,
    config: Config,
    metrics: Sequence[str],
    sources: Mapping[str, Any],
    examples_of: Callable[[Config], Sequence[Any]],
    page: Path,
) -> list[Path]:
    """Samples and measures; writes the results and the report. Returns the pictures and the report.

    Args:
      config: of the last run.
      metrics, sources: as of `evaluate`.
      examples_of: as of Evaluation.losses.
      page: the report.
    """
    from data_pipelines.scenes.check import check_example, verdicts
    from imagen_jax.evaluation import pages, table

    judge = sources.get("judge", "")
    names = list(metrics) or table.choose(job.light, judge)
    table.check_suits(names, job.light, judge)
    if table.LOSSES in names and not job.parts:
        raise UserError("--metrics has losses, which need the run's dataset; leave out --prompts")
    answers = job.out / "judge_answers.jsonl"
    found = table.metrics(names, table.Sources(check_example, answers=answers, **sources))
    pipe = job.load()
    columns = job.columns(pipe) if found else {}
    results = job.measure(columns, found)
    protocols = {
        name: job.write(
            name, metric, results[name],
            {c: column.protocol for c, column in columns.items()}, pipe.stages[-1].size,
        )
        for name, metric in found.items()
    }  # fmt: skip
    if table.LOSSES in names:
        from imagen_jax.evaluation import losses

        tables, records = job.losses(pipe, examples_of)
        found[table.LOSSES], results[table.LOSSES] = losses.METRIC, tables
        job.write(table.LOSSES, losses.METRIC, tables, records, pipe.stages[-1].size)
    return pages.write(job, config, columns, found, results, protocols, verdicts, page)


def split_suite(config: Config, split: str, num: int | None, full: bool = True) -> Suite:
    """Returns the first captions of a split of a run's dataset, with their images.

    Args:
      num: number of captions; None for NUM, or all if they are fewer.
      full: give whole images even if the network trains on crops.
    """
    from data_pipelines.reading.check import check_dataset
    from imagen_jax.evaluation.samples import Lazy
    from imagen_jax.evaluation.suites import Suite, check_num

    if full and config.full_size != config.unet.image_size:
        model = {**config.model, "image_size": config.full_size}
        if config.unet.low_res:
            model["low_res"] = config.full_size // config.upscale
        config = dataclasses.replace(config, model=model)
    check_dataset(config)
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    reader = Reader(config)
    available = reader.count(split)
    check_num(num, available, f"the split {split!r} of {config.data.task}")
    examples = Lazy(
        min(num or NUM, available), lambda start, stop: reader.examples(split, stop, start)
    )
    record = {"suite": "dataset", "task": config.data.task, "split": split}
    record |= {"categories": list(config.data.categories)} if config.data.categories else {}
    return Suite(f"{config.data.task} {split}", examples, record)


def scenes_suite(config: Config, split: str, num: int, seed: int) -> Suite:
    """Draws scenes of the run's categories, leaving out captions that its encoder cannot take.

    With the seed 0 they are those of the datasets that `data.build` prepares.
    """
    from data_pipelines.scenes.draw import render
    from data_pipelines.scenes.grammar import nth_scene
    from data_pipelines.scenes.vocabulary import SPLITS
    from imagen_jax.evaluation.samples import Lazy
    from imagen_jax.evaluation.suites import Suite
    from imagen_jax.text import load_encoder

    if split not in SPLITS:
        raise UserError(f"--split is {split!r}; scenes have {', '.join(SPLITS)}")
    categories = config.data.categories if config.data.task.startswith(SCENES) else ()
    encoders = [load_encoder(part.encoder, part.max_tokens) for part in config.text.parts]
    scenes, index = [], 0
    while len(scenes) < num:
        scene = nth_scene(index, split, seed, categories)
        if all(e.num_tokens(scene.caption) <= e.max_tokens for e in encoders):
            scenes.append((f"{split}-{index:06d}", scene))
        index += 1

    def read(start: int, stop: int) -> list[dict[str, Any]]:
        return [
            {
                "id": name,
                "caption": scene.caption,
                "category": scene.category,
                "scene": scene.to_json(),
                "image": render(scene, config.full_size),
            }
            for name, scene in scenes[start:stop]
        ]

    record = {"suite": SCENES, "split": split, "draw_seed": seed, "categories": list(categories)}
    return Suite(SCENES, Lazy(num, read), record)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
