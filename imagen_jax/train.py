"""Trains one stage of the cascade.

    python -m imagen_jax.train --config=configs/demo.py --workdir=runs/demo

Any key of the config can be given on the command line: --config.model.embed_dim=64. Run the same
command again to go on from the last checkpoint. The workdir holds config.json, metrics.jsonl,
TensorBoard events, checkpoints/ and samples/.

Exit codes: 0 trained to the last step; 75 saved and stopped before it (SIGTERM, Ctrl-C); 2 bad
input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from imagen_jax import cli, distributed, experiment, fits, profiling, topologies
from imagen_jax import config as config_files
from imagen_jax.actions import Actions
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.cli import log
from imagen_jax.compilation import compile_ahead
from imagen_jax.errors import UserError
from imagen_jax.files import make_folder, write_text
from imagen_jax.profiling import Profile
from imagen_jax.run_config import Config, parse
from imagen_jax.startup import Startup, process_age

FLAGS = flags.FLAGS

# EX_TEMPFAIL of sysexits.h, "try again": what restarts a run must tell a preemption from its end.
STOPPED = 75
# How far the host runs ahead of the device: each step of it holds a batch on the device, and delays
# a stop.
AHEAD_S, MOST_AHEAD = 2.0, 16


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    cli.define_config_flags(
        None, "Config file, for example configs/demo.py or configs/base64.py:tiny."
    )
    flags.DEFINE_string("workdir", None, "Where the run lives; made if it is not there.")
    flags.DEFINE_bool(
        "distributed",
        False,
        "Several hosts that JAX can find by itself (Cloud TPU VM, GKE, SLURM).",
    )
    flags.DEFINE_string("coordinator", "", "host:port of process 0, if given by hand.")
    flags.DEFINE_integer("num_processes", 1, "Processes in all, with --coordinator.")
    flags.DEFINE_integer("process_id", 0, "This process, with --coordinator.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all processes at the start.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds of silence after which a process is taken for dead."
    )
    flags.DEFINE_string(
        "profile_steps",
        "",
        "FIRST:LAST, both included: write a trace of these steps to WORKDIR/profile, for XProf.",
    )
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Parses flags, then trains."""
    del argv
    startup = Startup(process_age())
    startup.done("imports")
    if not FLAGS.config or not FLAGS.workdir:
        raise UserError("--config=FILE and --workdir=DIR are both needed (see --help)")
    if "://" in FLAGS.workdir:
        raise UserError(
            f"--workdir is {FLAGS.workdir!r}; it must be a path that all hosts share, such as a "
            "mounted bucket (docs/launch.md)"
        )
    config = parse(config_files.load(FLAGS.config, FLAGS.set))
    profiled = profiling.parse_steps(FLAGS.profile_steps, config.num_steps)
    workdir = Path(FLAGS.workdir).absolute()
    start_processes({"workdir": str(workdir), "config": dataclasses.asdict(config)})
    startup.done("configs and processes")
    with distributed.failing_at_once():
        finished = train(config, workdir, distributed.StopRequest(), startup, profiled)
    if not finished:
        sys.exit(STOPPED)


def start_processes(settings: dict[str, Any]) -> None:
    """Joins the other processes that the flags speak of, if any; all must have equal `settings`."""
    if FLAGS.coordinator:
        job = distributed.Job(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    elif FLAGS.distributed:
        job = distributed.discover(FLAGS.join_timeout)
    elif FLAGS.num_processes != 1:
        raise UserError(f"--num_processes is {FLAGS.num_processes}; it needs --coordinator")
    else:
        return
    distributed.join(job, settings, FLAGS.join_timeout, FLAGS.heartbeat_timeout)


def train(
    config: Config,
    workdir: Path,
    stop: distributed.StopRequest,
    startup: Startup | None = None,
    profiled: Sequence[int] = (),
) -> bool:
    """Runs until `num_steps`, or until `stop` asks, and leaves a checkpoint of the last step.

    Args:
      startup: counts the time to the first step; by default from now on.
      profiled: the steps to trace.

    Returns:
      Whether the run is now trained to `num_steps`.
    """
    startup = startup or Startup()
    built = experiment.build(config)
    fits.check_fits(built, topologies.device_memory())
    startup.done("network")
    # TensorFlow is most of a cold start; a bad config should fail before it is imported.
    with cli.quiet_imports():
        from imagen_jax import data, metrics

    startup.done("imports")
    if jax.process_index() == 0:
        data.build(config)
    distributed.wait_for_all("data")
    startup.done("data building")
    data.open_task(config)
    startup.done("data opening")
    make_folder(workdir, "workdir")
    # Closed even if training fails, so that a save under way is finished or cleanly dropped.
    with contextlib.closing(Checkpoints(workdir, config.checkpoint)) as checkpoints:
        state, position = jax.block_until_ready(start_or_resume(built, checkpoints))
        write_config(workdir, config)
        start = int(state.step)
        startup.done("restore" if start else "init")
        if start >= config.num_steps:
            log.info("already trained for %d steps: %s", start, workdir)
            return True
        batches = data.train_batches(config, position["examples"], *built.batch_share)
        # Read before compiling, so that the next ones are read meanwhile.
        batches = itertools.chain([next(batches)], batches)
        startup.done("first batch")
        sizes = (config.num_steps, config.batch_size, built.model_flops)
        startup.done("network")
        profile = Profile(profiled, workdir / "profile")
        logger = metrics.MetricLogger(workdir, *sizes)
        with contextlib.closing(logger), contextlib.closing(profile):
            logger.resume_at(start)
            offset = position["examples"] - start * config.batch_size
            actions = Actions(built, workdir, checkpoints, logger, profile, startup, offset)
            startup.done("data opening")
            if start == 0:
                log.info("\n%s", metrics.overview(built.abstract_params))
            devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
            log.info("training %s parameters on %s", f"{built.num_params:,}", devices)
            shape = " x ".join(f"{axis}={size}" for axis, size in built.mesh.shape.items())
            log.info("%s, %d microbatch(es), remat=%s", shape, built.microbatches, built.remat)
            log.info(compile_ahead(built.step.lower(built.abstract_state, built.abstract_batch)))
            startup.done("compile")
            return run_loop(built, state, start, batches, logger, actions, stop)


def start_or_resume(built: experiment.Experiment, checkpoints: Checkpoints):
    """The state and the position in the data to start from, in this order:

    1. the newest checkpoint of this workdir, with its place in the data;
    2. freshly initialised weights and the first example.
    """
    if checkpoints.latest_step() is None:
        return built.init(), {"examples": 0}
    state, position = checkpoints.restore(built.abstract_state, built.config.identity)
    log.info("resuming from step %d in %s", int(state.step), checkpoints.directory)
    return state, position


def run_loop(built, state, start, batches, logger, actions, stop) -> bool:
    """The loop itself; True if it reached the last step.

    The host runs ahead of the device by up to AHEAD_S, then fetches the metrics of all steps but
    the newest. So the device never waits for the host, not even for one that is held up a while.
    """
    config = built.config
    logger.restart_clock()
    pending: list[tuple[int, Any]] = []
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, config.num_steps + 1):
            if actions.profile.starts(step):
                fetch(logger, pending, config.log_every)
                with logger.pause():
                    actions.profile.start(state)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = built.step(state, built.put(next(batches)))
            if step == start + 1:
                actions.started(step, metrics)
            pending.append((step, metrics))
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
                log.info("stopped at step %d; the same command goes on from there", step)
                return step == config.num_steps
    return True


def fetch(logger, pending: list[tuple[int, Any]], log_every: int, keep: int = 0) -> None:
    """Waits for all steps but the last `keep`, and hands their metrics to the logger."""
    while len(pending) > keep:
        step, metrics = pending.pop(0)
        logger.add(step, metrics)
        if step % log_every == 0:
            logger.flush(step)


def write_config(workdir: Path, config: Config) -> None:
    """Writes config.json, complete with every default."""
    if jax.process_index() == 0:
        write_text(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
