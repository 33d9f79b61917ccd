"""The training loop: starts or resumes a run, then trains to the last step or a request to stop."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from imagen_jax.common.cli import log
from imagen_jax.common.files import make_folder
from imagen_jax.devices import processes
from imagen_jax.devices.compilation import compile_ahead
from imagen_jax.runs import starts
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.local_checkpoints import LocalCheckpoints
from imagen_jax.runs.posthoc import open_snapshots
from imagen_jax.runs.state import RunState, recording
from imagen_jax.runs.workdir import PROFILE, locked, reporting_failures, write_config
from imagen_jax.training import metrics
from imagen_jax.training.experiment import Experiment
from imagen_jax.training.goodput import Goodput
from imagen_jax.training.guard import Guard
from imagen_jax.training.periodic import Actions, Evaluation
from imagen_jax.training.profiling import Profile
from imagen_jax.training.reader import Batch, Reader
from imagen_jax.training.resume import go_back, initial_state, start_or_resume
from imagen_jax.training.startup import Startup
from imagen_jax.training.step import TrainState

# Limits on how far the host runs ahead of the device, in seconds and in steps. Each step ahead
# keeps a batch in device memory and delays a stop.
AHEAD_S, MOST_AHEAD = 2.0, 16

# How run_loop ends, other than with the step where training diverged.
FINISHED, STOPPED = 0, -1


def train(
    experiment: Experiment,
    reader: Reader,
    workdir: Path,
    stop: Callable[[int], bool],
    startup: Startup | None = None,
    profiled: Sequence[int] = (),
    evals: Mapping[str, Evaluation] = {},
) -> bool:
    """Trains until `num_steps` or until `stop(step)` is true; saves a checkpoint of the last step.

    Args:
      stop: called with each step, and must agree on all hosts; True ends the run after that step.
      startup: measures the time to the first step (default: starting now).
      profiled: steps to trace into WORKDIR/profile.
      evals: the evaluations of the config section `evals`, by name.

    Returns:
      Whether the run reached `num_steps`.

    Raises:
      UserError: another process trains in this workdir.
      RunError: the workdir cannot be written, all checkpoints are damaged, or training diverges.
    """
    startup = startup or Startup()
    config = experiment.config
    make_folder(workdir, "workdir")
    main = jax.process_index() == 0
    # Closing, even after an error, finishes a pending save or discards it cleanly.
    with (
        reporting_failures(workdir),
        locked(workdir) if main else contextlib.nullcontext(),
        recording(workdir, config.num_steps, main) as run_state,
        contextlib.closing(Checkpoints(workdir, config.checkpoint)) as checkpoints,
        contextlib.closing(LocalCheckpoints(workdir, config.checkpoint)) as local,
        processes.reporting_ends(functools.partial(_report_end, run_state, checkpoints)),
        open_snapshots(workdir, config) as snapshots,
    ):
        state, position = jax.block_until_ready(start_or_resume(experiment, checkpoints, local))
        start = int(state.step)
        local.discard_after(start)
        if main:
            write_config(workdir, config)
            source = "local_dir" if local.restored else "workdir" if start else ""
            starts.record(workdir, config, start, source)
        startup.done("restore" if start else "init")
        if start >= config.num_steps:
            log.info("already trained for %d steps: %s", start, workdir)
            run_state.end("finished", start)
            local.remove()
            return True
        if snapshots:
            snapshots.discard_after(start)
        batches = reader.train_batches(position["examples"], *experiment.batch_share)
        # Taking the first batch before compiling lets the reader prefetch during compilation.
        batches = itertools.chain([next(batches)], batches)
        startup.done("first batch")
        sizes = (config.num_steps, config.batch_size, experiment.stage.model_flops)
        startup.done("network")
        goodput = Goodput(workdir, startup, start, main)
        logger = metrics.MetricLogger(workdir, *sizes, reader, goodput, config.checkpoint.best_by)
        profile = Profile(profiled, logger.folder / PROFILE)
        closing = contextlib.closing
        with closing(goodput), closing(logger), closing(profile):
            logger.resume_at(start, position.get("window", ()))
            for step in checkpoints.damaged:
                logger.write(start, {"checkpoint/damaged_step": step})
            offset = position["examples"] - start * config.batch_size
            guard = Guard(config.guard, MOST_AHEAD)
            parts = (checkpoints, local, snapshots, logger, profile, startup, guard, run_state)
            actions = Actions(experiment, reader, workdir, *parts, goodput, offset, evals)
            startup.done("data opening")
            actions.catch_up(start, state)
            _log_setup(experiment, start)
            _compile(experiment)
            startup.done("compile")
            while (end := run_loop(experiment, state, start, batches, logger, actions, stop)) > 0:
                with goodput.spending("checkpoints"):
                    state, start = go_back(experiment, checkpoints, local, logger, actions, end)
                goodput.rewind(start)
            with goodput.spending("checkpoints"):
                checkpoints.wait()
        if end == FINISHED:
            local.remove()
        run_state.end("finished" if end == FINISHED else "preempted")
        return end == FINISHED


def _report_end(run_state: RunState, checkpoints: Checkpoints, end: processes.End) -> str:
    """Records that another process has ended; returns the last line of this one."""
    run_state.end("failed", reason=str(end))
    if end.reason and end.code > 1:  # says what to do
        return str(end)
    saved = checkpoints.steps()
    return f"{end}; the same command " + (
        f"resumes from step {saved[-1]}, with any number of processes" if saved else "starts again"
    )


def _log_setup(experiment: Experiment, start: int) -> None:
    stage = experiment.stage
    if start == 0:
        log.info("\n%s", metrics.overview(stage.abstract_params))
    devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
    log.info("training %s parameters on %s", f"{stage.num_params:,}", devices)
    shape = " x ".join(f"{axis}={size}" for axis, size in experiment.mesh.shape.items())
    log.info("%s, %d microbatch(es), remat=%s", shape, experiment.microbatches, experiment.remat)


def _compile(experiment: Experiment) -> None:
    shapes = (experiment.abstract_state, experiment.stage.abstract_batch)
    log.info(compile_ahead(experiment.step.lower(*shapes)))


def replay(experiment: Experiment, reader: Reader, workdir: Path, step: int) -> dict[str, Any]:
    """Repeats a step of a run, from the newest checkpoint before it; changes nothing on disk.

    After a return to a checkpoint the data of a step are others than at first; this repeats the
    steps as they follow the checkpoint.

    Returns:
      The metrics of the step, see step.train_step.

    Raises:
      RunError: the checkpoint is damaged.
    """
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        before = [s for s in checkpoints.steps() if s < step]
        if before:
            wanted = (experiment.abstract_state, experiment.config.identity, before[-1])
            state, position = checkpoints.restore(*wanted)
        else:
            state, position = initial_state(experiment), {"examples": 0}
    start = int(state.step)
    log.info("repeating steps %d to %d", start + 1, step)
    batches = reader.train_batches(position["examples"], *experiment.batch_share)
    for _ in range(start, step):
        state, found = experiment.step(state, experiment.stage.put(next(batches)))
    return jax.device_get(found)


def run_loop(
    experiment: Experiment,
    state: TrainState,
    start: int,
    batches: Iterator[Batch],
    logger: metrics.MetricLogger,
    actions: Actions,
    stop: Callable[[int], bool],
) -> int:
    """Runs the steps after `start`; returns FINISHED, STOPPED, or the step where it diverged.

    The host runs up to AHEAD_S ahead of the device, then fetches the metrics of all steps but the
    newest. The device therefore never waits for the host, even if the host is briefly delayed.
    """
    config, step_fn, put = experiment.config, experiment.step, experiment.stage.put
    guard = actions.guard
    logger.restart_clock()
    pending: list[tuple[int, Any]] = []
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, config.num_steps + 1):
            if actions.profile.starts(step):
                fetch(logger, actions, pending, config.log_every)
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
                fetch(logger, actions, pending, config.log_every, keep=1)
            actions.watch(step)
            stopping = stop(step)
            # The next start catches up on what a stop leaves out. After the last step, none does.
            last = step == config.num_steps
            due = [actions.save] if stopping and not last else actions.due(step)
            if due or guard.decides(step):
                fetch(logger, actions, pending, config.log_every)
                if guard.diverged and not stopping:
                    return step
                if (stopping or last) and step % config.log_every:
                    logger.flush(step)
                with logger.pause():
                    for action in due:
                        action(step, state)
                if guard.diverged and not stopping:
                    return step
            if actions.local_due(step, due):
                # Unlike what is due, this does not end the loop if it shows a divergence: with and
                # without local checkpoints, a run goes back at the same step.
                fetch(logger, actions, pending, config.log_every)
                with logger.pause():
                    actions.save_local(step, state)
            if stopping:
                saved = "from there" if guard.steady else "from the last checkpoint"
                log.info("stopped at step %d; the same command resumes %s", step, saved)
                return FINISHED if last else STOPPED
    return FINISHED


def fetch(
    logger: metrics.MetricLogger,
    actions: Actions,
    pending: list[tuple[int, Any]],
    log_every: int,
    keep: int = 0,
) -> None:
    """Waits for all pending steps but the last `keep`; logs their metrics and counts skips."""
    while len(pending) > keep:
        step, step_metrics = pending.pop(0)
        found = logger.add(step_metrics)
        if actions.guard.see(step, bool(found["skipped"]), float(found["loss"])):
            actions.report_spike(step, float(found["loss"]))
        if step % log_every == 0:
            logger.flush(step)
