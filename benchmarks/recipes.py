"""Compares recipes over training time: what they draw right, and their error.

    python -m benchmarks.recipes --minutes=10 --seeds=3 --out=recipes

By default, the demo's transformer and its U-Net, each with the demo's recipe and with the paper's.
--recipe names others: "NAME: CONFIG KEY=VALUE ...". All train on the data of the first recipe, in
one process and in alternating segments, so a change of the machine's load affects all. The clock
runs only during training steps. Learning rates are constant, because the number of steps follows
from the time. After each segment, the EMA weights are judged on the same held-out data:

    error      mean squared error of x, at noise levels uniform in t over log-SNR -9 to 4
    alignment  share of captions with one object whose image satisfies every claim, at the config's
               guidance, over all seeds, with its 95% Wilson interval

Writes a table (.md), a plot (.png) and all figures (.json).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
from absl import flags

from benchmarks.loss_against_time import Run
from imagen_jax.common import cli, pictures, typed_config
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_text
from imagen_jax.common.intervals import wilson
from imagen_jax.config import Config, parse
from imagen_jax.diffusion.conditioning import stack_text
from imagen_jax.stage import Stage

FLAGS = flags.FLAGS

PAPER = (
    "diffusion.prediction=eps diffusion.weighting=eps diffusion.weighting_bias=0.0 "
    "diffusion.time_sampling=uniform diffusion.time_mean=0.0 diffusion.time_std=1.0 "
    "diffusion.log_snr_min=-20.0 diffusion.log_snr_max=20.0 diffusion.caption_dropout=0.1"
)
ADAM = "optimizer.name=adam optimizer.learning_rate=2e-3 optimizer.adam_learning_rate=None"
RECIPES = (
    "transformer: configs/demo.py",
    f"transformer, the paper's recipe: configs/demo.py {PAPER} {ADAM}",
    "U-Net: configs/demo.py:unet",
    f"U-Net, the paper's recipe: configs/demo.py:unet {PAPER}",
)


def define_flags() -> None:
    flags.DEFINE_multi_string("recipe", RECIPES, "NAME: CONFIG KEY=VALUE ...; repeat for each.")
    flags.DEFINE_float("minutes", 10.0, "Training time of each recipe and seed.", 0.05)
    flags.DEFINE_integer("seeds", 3, "Number of seeds of each recipe.", 1)
    flags.DEFINE_integer("segments", 4, "Number of alternating segments.", 1)
    flags.DEFINE_integer("captions", 64, "Number of captions with one object to draw.", 1)
    flags.DEFINE_string("out", "recipes", "Path of the output files, without the suffix.")


def main(argv: list[str]) -> None:
    """Trains all recipes, prints a Markdown table and writes the files."""
    del argv
    configs = read_recipes(FLAGS.recipe)
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader, build
    first = next(iter(configs.values()))
    build(first)
    examples = one_object(Reader(first).examples("heldout", 4 * FLAGS.captions), FLAGS.captions)
    trials = [
        Trial(name, dataclasses.replace(config, seed=seed))
        for name, config in configs.items()
        for seed in range(FLAGS.seeds)
    ]
    for segment in range(1, FLAGS.segments + 1):
        for trial in trials:
            trial.train_until(segment * FLAGS.minutes * 60 / FLAGS.segments, examples)
            print(f"{trial.name}, seed {trial.config.seed}: {trial.points[-1]}", flush=True)
    text = table(trials)
    print(text)
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out.with_suffix(".md"), text)
    figures = [dataclasses.asdict(point) for trial in trials for point in trial.points]
    settings = {"recipes": FLAGS.recipe, "device": jax.devices()[0].device_kind}
    write_text(
        out.with_suffix(".json"), json.dumps({**settings, "points": figures}, indent=1) + "\n"
    )
    plot(trials, out.with_suffix(".png"))


def read_recipes(texts: list[str]) -> dict[str, Config]:
    """Returns the config of each recipe, with the data of the first.

    Raises:
      UserError: a recipe is not NAME: CONFIG, or its config is not valid.
    """
    configs: dict[str, Config] = {}
    for text in texts:
        name, colon, rest = text.partition(": ")
        if not colon or not rest.strip():
            raise UserError(f"--recipe is {text!r}; it must be 'NAME: CONFIG KEY=VALUE ...'")
        file, *overrides = rest.split()
        config = parse(typed_config.load(file, ["optimizer.schedule=constant", *overrides]))
        if configs:
            first = next(iter(configs.values()))
            config = dataclasses.replace(config, data=first.data)
        configs[name] = config
    return configs


def one_object(examples: list[dict], num: int) -> list[dict]:
    """Returns the first `num` examples whose scene has one object and no word."""
    from data_pipelines.scenes.scene import Scene

    scenes = [Scene.from_json(example["scene"]) for example in examples]
    pairs = zip(examples, scenes, strict=True)
    return [e for e, s in pairs if len(s.objects) == 1 and s.word is None][:num]


@dataclasses.dataclass(frozen=True)
class Point:
    """A recipe and seed after some time: how many of `num` captions were drawn fully right."""

    recipe: str
    seed: int
    seconds: float
    step: int
    error: float
    right: int
    num: int


class Trial:
    """A recipe and a seed."""

    def __init__(self, name: str, config: Config):
        self.name, self.config, self.points = name, config, list[Point]()
        common = {"schedule": "cosine", "log_snr_min": -9.0, "log_snr_max": 4.0, "weighting": "x"}
        diffusion = dataclasses.replace(config.diffusion, **common, weighting_bias=0.0)
        self._run = Run(config, Stage(dataclasses.replace(config, diffusion=diffusion)))

    def train_until(self, seconds: float, examples: list[dict]) -> None:
        """Trains until the total time is `seconds`, then adds a point."""
        from data_pipelines.scenes.check import check_example

        self._run.train_until(seconds)
        step, spent, error = self._run.points[-1]
        seeds = np.arange(len(examples), dtype=np.uint32)
        stage = self._run.experiment.stage
        images = stage.sample(self._run.ema, seeds, stack_text(examples), self.config.sampling)
        right = sum(all(check_example(i, e)[1]) for i, e in zip(images, examples, strict=True))
        point = (self.name, self.config.seed, spent, step, error, right, len(examples))
        self.points.append(Point(*point))


def rows(trials: list[Trial]) -> dict[str, list[list[Point]]]:
    """Returns, for each recipe, the points of all seeds at each time."""
    names = dict.fromkeys(trial.name for trial in trials)
    return {
        name: [
            list(points)
            for points in zip(*(t.points for t in trials if t.name == name), strict=True)
        ]
        for name in names
    }


def table(trials: list[Trial]) -> str:
    """Formats steps, error and alignment of each recipe at each time, over all seeds."""
    lines = ["| recipe | seconds | steps | error (range) | fully right |", "|---" * 5 + "|"]
    for name, times in rows(trials).items():
        for points in times:
            errors = [p.error for p in points]
            right, num = sum(p.right for p in points), sum(p.num for p in points)
            low, high = wilson(right, num)
            lines.append(
                f"| {name} | {np.mean([p.seconds for p in points]):.0f} "
                f"| {np.mean([p.step for p in points]):,.0f} "
                f"| {np.mean(errors):.4f} ({min(errors):.4f}-{max(errors):.4f}) "
                f"| {right / num:.0%} ({100 * low:.0f}-{high:.0%}) of {num} |"
            )
    return "\n".join(lines) + "\n"


def plot(trials: list[Trial], path: Path) -> None:
    """Plots the mean error of each recipe over seconds of training."""
    with pictures.chart(path, xlabel="seconds of training", ylabel="held-out error of x") as axes:
        for name, times in rows(trials).items():
            xs = [np.mean([p.seconds for p in points]) for points in times]
            axes.plot(
                xs, [np.mean([p.error for p in points]) for points in times], ".-", label=name
            )


if __name__ == "__main__":
    define_flags()
    cli.run(main)
