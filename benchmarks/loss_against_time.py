"""Compares the loss of the Efficient and the ordinary U-Net over wall time, for super-resolution.

    python -m benchmarks.loss_against_time --minutes=10 --out=loss_against_time

Both networks have nearly the same number of parameters. They share a config's recipe and data; only
the section `model` differs. (benchmarks.efficient_unet compares their speed alone.) One process
trains them in alternating segments, so a change of the machine's load affects both. The clock runs
only during training steps, not while compiling, reading data or evaluating. After each segment, the
benchmark evaluates the EMA weights on held-out data, always with the same noise. The learning rate
is constant, because the networks take different numbers of steps in the same time.

Writes a table (.md), a plot (.png) and all figures (.json).
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from benchmarks.efficient_unet import efficient, ordinary
from imagen_jax.common import cli, pictures, typed_config
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_text
from imagen_jax.config import NOT_WEIGHTS, Config, parse
from imagen_jax.stage import Params, Stage
from imagen_jax.training import experiment

FLAGS = flags.FLAGS
ROWS = 8  # rows of the table


def define_flags() -> None:
    cli.define_config_flags("configs/demo_sr.py", "Super-resolution config.")
    flags.DEFINE_integer("width", 8, "Channels of the first level of the Efficient U-Net.", 4)
    flags.DEFINE_float("minutes", 10.0, "Training time of each network.", 0.1)
    flags.DEFINE_integer("segments", 24, "Number of alternating segments per network.", 1)
    flags.DEFINE_string("out", "loss_against_time", "Path of the output files, without the suffix.")


def main(argv: list[str]) -> None:
    """Trains both networks, prints a Markdown table and writes the files."""
    del argv
    config = parse(typed_config.load(FLAGS.config, ["optimizer.schedule=constant", *FLAGS.set]))
    if not config.unet.low_res:
        raise UserError(
            f"--config={FLAGS.config} has model.low_res=0; pass a super-resolution config, such as "
            "configs/demo_sr.py"
        )
    with cli.quiet_imports():
        from data_pipelines.reading.reader import build
    build(config)
    common = {key: getattr(config.unet, key) for key in ("low_res", "dtype", "text_dim")}
    networks = {
        "ordinary": ("unet", ordinary(FLAGS.width, config.unet.image_size, **common)),
        "Efficient": (
            "efficient_unet",
            efficient(FLAGS.width, config.unet.image_size, **common),
        ),
    }
    runs = {}
    for title, (name, network) in networks.items():
        runs[title] = Run(with_network(config, name, network))
        print(f"{title}: {runs[title].experiment.stage.num_params:,} parameters", flush=True)
    for segment in range(1, FLAGS.segments + 1):
        for title, run in runs.items():
            run.train_until(segment * FLAGS.minutes * 60 / FLAGS.segments)
            step, seconds, loss = run.points[-1]
            print(f"{seconds:.0f} s  {title}: step {step}, loss {loss:.4f}", flush=True)
    text = table(runs)
    print(text)
    out = Path(FLAGS.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    figures = {
        "settings": {"minutes": FLAGS.minutes, "width": FLAGS.width, "config": FLAGS.config},
        "device": jax.devices()[0].device_kind,
        "params": {title: run.experiment.stage.num_params for title, run in runs.items()},
        "step_seconds_loss": {title: run.points for title, run in runs.items()},
    }
    write_text(out.with_suffix(".json"), json.dumps(figures, indent=1) + "\n")
    write_text(out.with_suffix(".md"), text)
    plot(runs, out.with_suffix(".png"))


def with_network(config: Config, name: str, network: Any) -> Config:
    """Returns the config with its section `model` replaced."""
    values = dataclasses.asdict(network)
    section = {k: v for k, v in values.items() if k not in NOT_WEIGHTS}
    return dataclasses.replace(config, model={"name": name, "dtype": network.dtype, **section})


class Run:
    """Trains one network and records its points: (step, seconds, held-out loss).

    Args:
      judge: computes the held-out loss (default: the stage that is trained).
    """

    def __init__(self, config: Config, judge: Stage | None = None):
        with cli.quiet_imports():
            from data_pipelines.reading.reader import Reader

        self.experiment, reader = experiment.build(config), Reader(config)
        self._judge = judge or self.experiment.stage
        self._state = self.experiment.init()
        self._batches = reader.train_batches(0)
        self._held_out = reader.eval_batches()
        shapes = (self.experiment.abstract_state, self.experiment.stage.abstract_batch)
        self._step = self.experiment.step.lower(*shapes).compile()
        self._steps, self._seconds = 0, 0.0
        self.points = [(0, 0.0, self._held_out_loss())]

    def train_until(self, seconds: float) -> None:
        """Trains until the total time is `seconds`, then adds a point."""
        while self._seconds < seconds:
            batch = jax.block_until_ready(self.experiment.stage.put(next(self._batches)))
            start = time.perf_counter()
            self._state, _ = jax.block_until_ready(self._step(self._state, batch))
            self._seconds += time.perf_counter() - start
            self._steps += 1
        self.points.append((self._steps, self._seconds, self._held_out_loss()))

    def _held_out_loss(self) -> float:
        return self._judge.held_out_losses(self.ema, self._held_out)["eval_loss"]

    @property
    def ema(self) -> Params:
        """The EMA of the weights."""
        return self._state.ema


def sooner(slow: Run, fast: Run) -> float | None:
    """Returns how many times sooner `fast` reaches the final loss of `slow`.

    None if `fast` never reaches it, or starts below it.
    """
    _, seconds, losses = (np.array(column) for column in zip(*fast.points, strict=True))
    _, end, goal = slow.points[-1]
    reached = np.flatnonzero(losses <= goal)
    if not reached.size or reached[0] == 0:
        return None
    i = reached[0]  # interpolate between this point and the previous one
    return end / float(np.interp(-goal, -losses[i - 1 : i + 1], seconds[i - 1 : i + 1]))


def table(runs: dict[str, Run]) -> str:
    """Formats steps and held-out losses at ROWS + 1 points, and which network is faster."""
    names = list(runs)
    lines = [
        "| seconds | " + " | ".join(f"{n}: steps | loss" for n in names) + " |",
        "|---" * (1 + 2 * len(names)) + "|",
    ]
    points = [run.points for run in runs.values()]
    shown = np.unique(np.linspace(0, len(points[0]) - 1, ROWS + 1).round().astype(int))
    for i in shown:
        cells = [f"{p[i][0]:,} | {p[i][2]:.4f}" for p in points]
        lines.append(f"| {points[0][i][1]:.0f} | " + " | ".join(cells) + " |")
    lines.append("")
    for slow, fast in (names, names[::-1]):
        if ratio := sooner(runs[slow], runs[fast]):
            end = runs[slow].points[-1][2]
            lines.append(
                f"{fast} reaches the final loss of {slow}, {end:.4f}, {ratio:.1f} times sooner."
            )
    return "\n".join(lines) + "\n"


def plot(runs: dict[str, Run], path: Path) -> None:
    """Plots the held-out loss over seconds of training."""
    labels = {"xlabel": "seconds of training", "ylabel": "held-out loss, EMA weights"}
    with pictures.chart(path, **labels) as axes:
        for title, run in runs.items():
            _, seconds, losses = zip(*run.points, strict=True)
            label = f"{title}, {run.experiment.stage.num_params / 1e6:.2f}M parameters"
            axes.plot(seconds, losses, ".-", label=label)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
