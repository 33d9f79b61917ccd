"""The training loop: starts or resumes a run, then trains to the last step or a request to stop."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from imagen_jax.common.cli import log
from imagen_jax.common.files import make_folder
from imagen_jax.devices.compilation import compile_ahead
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.posthoc import open_snapshots
from imagen_jax.runs.workdir import PROFILE, write_config
from imagen_jax.training import metrics
from imagen_jax.training.experiment import Experiment
from imagen_jax.training.periodic import Actions
from imagen_jax.training.profiling import Profile
from imagen_jax.training.reader import Batch, Reader
from imagen_jax.training.startup import Startup
from imagen_jax.training.step import TrainState

# Limits on how far the host runs ahead of the device, in seconds and in steps. Each step ahead
# keeps a batch in device memory and delays a stop.
AHEAD_S, MOST_AHEAD = 2.0, 16


def train(
    experiment: Experiment,
    reader: Reader,
    workdir: Path,
    stop: Callable[[int], bool],
    startup: Startup | None = None,
    profiled: Sequence[int] = (),
) -> bool:
    """Trains until `num_steps` or until `stop(step)` is true; saves a checkpoint of the last step.

    Args:
      stop: called with each step, and must agree on all hosts; True ends the run after that step.
      startup: measures the time to the first step (default: starting now).
      profiled: steps to trace into WORKDIR/profile.

    Returns:
      Whether the run reached `num_steps`.
    """
    startup = startup or Startup()
    config = experiment.config
    make_folder(workdir, "workdir")
    # Closing, even after an error, finishes a pending save or discards it cleanly.
    with (
        contextlib.closing(Checkpoints(workdir, config.checkpoint)) as checkpoints,
        open_snapshots(workdir, config) as snapshots,
    ):
        state, position = jax.block_until_ready(start_or_resume(experiment, checkpoints))
        if jax.process_index() == 0:
            write_config(workdir, config)
        start = int(state.step)
        startup.done("restore" if start else "init")
        if start >= config.num_steps:
            log.info("already trained for %d steps: %s", start, workdir)
            return True
        if snapshots:
            snapshots.discard_after(start)
        batches = reader.train_batches(position["examples"], *experiment.batch_share)
        # Taking the first batch before compiling lets the reader prefetch during compilation.
        batches = itertools.chain([next(batches)], batches)
        startup.done("first batch")
        sizes = (config.num_steps, config.batch_size, experiment.stage.model_flops)
        startup.done("network")
        profile = Profile(profiled, workdir / PROFILE)
        logger = metrics.MetricLogger(workdir, *sizes, reader)
        with contextlib.closing(logger), contextlib.closing(profile):
            logger.resume_at(start)
            offset = position["examples"] - start * config.batch_size
            actions = Actions(
                *(experiment, reader, workdir, checkpoints, snapshots),
                *(logger, profile, startup, offset),
            )
            startup.done("data opening")
            _log_setup(experiment, start)
            lowered = experiment.step.lower(
                experiment.abstract_state, experiment.stage.abstract_batch
            )
            log.info(compile_ahead(lowered))
            startup.done("compile")
            return run_loop(experiment, state, start, batches, logger, actions, stop)


def _log_setup(experiment: Experiment, start: int) -> None:
    stage = experiment.stage
    if start == 0:
        log.info("\n%s", metrics.overview(stage.abstract_params))
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    log.info("training %s parameters on %s", f"{stage.num_params:,}", devices)
    shape = " x ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())
    log.info("%s, %d microbatch(es), remat=%s", shape, experiment.microbatches, experiment.remat)


def start_or_resume(
    experiment: Experiment, checkpoints: Checkpoints
) -> tuple[TrainState, dict[str, int]]:
    """Returns the state and the data position to start from. The first that exists wins:

    1. the newest checkpoint of this workdir and its data position;
    2. initialized weights and the first example.
    """
    if checkpoints.latest_step() is None:
        return experiment.init(), {"examples": 0}
    state, position = checkpoints.restore(experiment.abstract_state, experiment.config.identity)
    log.info("resuming from step %d in %s", int(state.step), checkpoints.directory)
    return state, position


def run_loop(
    experiment: Experiment,
    state: TrainState,
    start: int,
    batches: Iterator[Batch],
    logger: metrics.MetricLogger,
    actions: Actions,
    stop: Callable[[int], bool],
) -> bool:
    """Runs the steps after `start`; returns whether it reached the last one.

    The host runs up to AHEAD_S ahead of the device, then fetches the metrics of all steps but the
    newest. The device therefore never waits for the host, even if the host is briefly delayed.
    """
    config, step_fn, put = experiment.config, experiment.step, experiment.stage.put
    logger.restart_clock()
    pending: list[tuple[int, Any]] = []
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, config.num_steps + 1):
            if actions.profile.starts(step):
                fetch(logger, pending, config.log_every)
                with logger.pause():
                    actions.profile.start(state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                with logger.waiting():
                    batch = next(batches)
                state, step_metrics = step_fn(state, put(batch))
            if step == start + 1:
                actions.started(step, step_metrics)
            pending.append((step, step_metrics))
            ahead = min(AHEAD_S / logger.step_time, MOST_AHEAD)
            if len(pending) > ahead or (step - 1) % config.log_every == 0:
                fetch(logger, pending, config.log_every, keep=1)
            stopping = stop(step)
            due = [actions.save] if stopping else actions.due(step)
            if due:
                fetch(logger, pending, config.log_every)
                if (stopping or step == config.num_steps) and step % config.log_every:
                    logger.flush(step)
                with logger.pause():
                    for action in due:
                        action(step, state)
            if stopping:
                log.info("stopped at step %d; the same command resumes from there", step)
                return step == config.num_steps
    return True


def fetch(
    logger: metrics.MetricLogger, pending: list[tuple[int, Any]], log_every: int, keep: int = 0
) -> None:
    """Waits for all pending steps but the last `keep` and logs their metrics."""
    while len(pending) > keep:
        step, step_metrics = pending.pop(0)
        logger.add(step, step_metrics)
        if step % log_every == 0:
            logger.flush(step)
