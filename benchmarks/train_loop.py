"""Measures the overhead of the training loop: the whole loop against the bare jitted step.

    python -m benchmarks.train_loop --config=configs/demo.py

The whole loop is `loop.run_loop` with data, transfer, metrics and log lines. The bare step runs on
one batch that stays on the device, and the benchmark waits for the result at the end. Both take
turns of --steps steps in one process, so that changes of the machine's load affect both. The first
table has medians over the turns; the overhead is the median over pairs of adjacent turns. The
second table has the host's work for a step, measured alone. An accelerator runs while the host does
this work; on a CPU, the work takes cores from the step.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from imagen_jax.common import cli, typed_config
from imagen_jax.config import parse
from imagen_jax.devices import compilation
from imagen_jax.sections import GuardConfig
from imagen_jax.training import experiment as experiments
from imagen_jax.training.guard import Guard
from imagen_jax.training.profiling import Profile

FLAGS = flags.FLAGS
Clock = Callable[[], float]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def define_flags() -> None:
    cli.define_config_flags("configs/demo.py", "Config file, as for imagen_jax.train.")
    flags.DEFINE_integer(
        "steps", 50, "Steps per turn, best a multiple of log_every so that log lines are whole.", 2
    )
    flags.DEFINE_integer("rounds", 7, "Number of turns of each program.", lower_bound=1)
    flags.DEFINE_enum(
        "clock",
        "wall",
        list(CLOCKS),
        "cpu counts only the time of this process, for a machine that other processes share.",
    )
    flags.DEFINE_string("json", "", "File to write the figures to, as JSON.")
    cli.define_cache_flag()


def main(argv: list[str]) -> None:
    """Measures and prints two tables in Markdown."""
    del argv
    compilation.use_cache(FLAGS.compilation_cache)
    config = parse(typed_config.load(FLAGS.config, FLAGS.set))
    # More steps than will run, because all actions are due at the last step.
    experiment = experiments.build(dataclasses.replace(config, num_steps=10**9))
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader, build
        from imagen_jax.training import metrics

    build(config)
    batches = Reader(experiment.config).train_batches(0)
    cli.log.setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as workdir:
        sizes = (experiment.config.num_steps, config.batch_size, experiment.stage.model_flops)
        logger = metrics.MetricLogger(Path(workdir), *sizes)
        turns = Turns(experiment, batches, logger, CLOCKS[FLAGS.clock])
        seconds = turns.measure(FLAGS.steps, FLAGS.rounds)
        host = turns.measure_host(FLAGS.steps, FLAGS.rounds)
        logger.close()
        batches.close()
    print(
        f"\n{FLAGS.config}, batch {config.batch_size}, {experiment.stage.num_params:,} parameters\n"
    )
    print(table(seconds, host, FLAGS.clock))
    if FLAGS.json:
        settings = {key: FLAGS[key].value for key in ("config", "set", "steps", "rounds", "clock")}
        settings |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        figures = {"settings": settings, "seconds_per_step": seconds, "host_seconds": host}
        Path(FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")


class NoActions:
    """Replaces periodic.Actions: nothing is ever due, and `save` keeps the state in memory."""

    profile = Profile((), Path())

    def __init__(self, config: GuardConfig):
        self.guard = Guard(config, delay=16)

    def watch(self, step: int) -> None:
        """Does nothing."""

    def local_due(self, step: int, due: list) -> bool:
        """Returns False."""
        return False

    def started(self, step: int, metrics: Any) -> None:
        """Does nothing."""

    def due(self, step: int) -> list:
        """Returns no actions."""
        return []

    def save(self, step: int, state: Any) -> None:
        """Keeps the state for the next turn."""
        self.state = state


class Turns:
    """Turns of the whole loop and the bare step; each continues from the state of the other."""

    def __init__(self, experiment: experiments.Experiment, batches: Any, logger: Any, clock: Clock):
        self._experiment, self._batches, self._logger, self._clock = (
            experiment,
            batches,
            logger,
            clock,
        )
        self._resident = experiment.stage.put(next(batches))
        self._state, self._step = experiment.init(), 0

    def measure(self, steps: int, rounds: int) -> dict[str, list[float]]:
        """Returns seconds per step for each round, after a warm-up round."""
        seconds = {"whole loop": [], "bare step": []}
        for turn in range(rounds + 1):
            # Which of the two comes first alternates as well.
            for name in sorted(seconds, reverse=turn % 2 == 0):
                start = self._clock()
                self._whole(steps) if name == "whole loop" else self._bare(steps)
                jax.block_until_ready(self._state)
                if turn:
                    seconds[name].append((self._clock() - start) / steps)
        return seconds

    def _whole(self, steps: int) -> None:
        from imagen_jax.training import loop  # brings TensorFlow

        actions = NoActions(self._experiment.config.guard)
        last = self._step + steps
        loop.run_loop(
            self._experiment, self._state, self._step, self._batches, self._logger, actions,
            lambda step: step == last,
        )  # fmt: skip
        self._state, self._step = actions.state, last

    def _bare(self, steps: int) -> None:
        for _ in range(steps):
            self._state, _ = self._experiment.step(self._state, self._resident)

    def measure_host(self, steps: int, rounds: int) -> dict[str, list[float]]:
        """Returns seconds per step of each part of the host's work, measured alone."""
        experiment, logger = self._experiment, self._logger
        batch = next(self._batches)
        _, metrics = jax.block_until_ready(experiment.step(self._state, self._resident))
        numbers = itertools.count(self._step)

        def log_line():
            logger.add(metrics)
            logger.flush(next(numbers))

        def put():
            jax.block_until_ready(experiment.stage.put(batch))

        parts = {
            "reading a batch": (lambda: next(self._batches), 1),
            "putting it on the device": (put, 1),
            "fetching metrics": (lambda: logger.add(metrics), 1),
            "writing a line, by log_every": (log_line, experiment.config.log_every),
        }
        return {
            name: [self._seconds(do, steps) / every for _ in range(rounds)]
            for name, (do, every) in parts.items()
        }

    def _seconds(self, do: Callable[[], Any], times: int) -> float:
        start = self._clock()
        for _ in range(times):
            do()
        return (self._clock() - start) / times


def table(seconds: dict[str, list[float]], host: dict[str, list[float]], clock: str) -> str:
    """Returns medians in ms with quartiles; the loop's overhead is in percent of the step."""
    whole, bare = (np.array(seconds[name]) for name in ("whole loop", "bare step"))
    lines = [f"| | {clock} ms per step | quartiles |", "|---|---|---|"]
    lines += [_row(name, np.array(values) * 1e3, "") for name, values in seconds.items()]
    lines.append(_row("overhead of the loop", (whole / bare - 1) * 100, "%"))
    lines += ["", f"| the host's work, alone | {clock} ms per step | quartiles |", "|---|---|---|"]
    lines += [_row(name, np.array(values) * 1e3, "") for name, values in host.items()]
    return "\n".join(lines)


def _row(name: str, values: np.ndarray, unit: str) -> str:
    low, middle, high = np.percentile(values, (25, 50, 75))
    return f"| {name} | {middle:.3g}{unit} | {low:.3g} to {high:.3g}{unit} |"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
