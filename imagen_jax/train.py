"""Trains one stage of the cascade.

    python -m imagen_jax.train --config=configs/demo.py --workdir=runs/demo

Any key of the config can be given on the command line: --config.model.embed_dim=64. Run the same
command again to resume from the last checkpoint. The workdir holds config.json, metrics.jsonl,
TensorBoard events, checkpoints/ and samples/.

Exit codes: 0 trained to the last step; 75 saved and stopped before it (SIGTERM, Ctrl-C); 2 bad
input.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from imagen_jax.common import cli, typed_config
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config, parse
from imagen_jax.devices import compilation, memory, processes
from imagen_jax.training import experiment as experiments
from imagen_jax.training import profiling
from imagen_jax.training.startup import Startup, process_age

FLAGS = flags.FLAGS

# EX_TEMPFAIL of sysexits.h, "try again": whatever restarts a run must tell a preemption from its
# end.
STOPPED = 75


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    cli.define_config_flags(
        None, "Config file, for example configs/demo.py or configs/base64.py:tiny."
    )
    flags.DEFINE_string("workdir", None, "Directory of the run; created if missing.")
    flags.DEFINE_bool(
        "distributed",
        False,
        "Several hosts that JAX can discover by itself (Cloud TPU VM, GKE, SLURM).",
    )
    flags.DEFINE_string("coordinator", "", "host:port of process 0, if set by hand.")
    flags.DEFINE_integer("num_processes", 1, "Number of processes, with --coordinator.")
    flags.DEFINE_integer("process_id", 0, "Index of this process, with --coordinator.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all processes at the start.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead."
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
    compilation.use_cache(FLAGS.compilation_cache)
    if not FLAGS.config or not FLAGS.workdir:
        raise UserError("--config=FILE and --workdir=DIR are both needed (see --help)")
    if "://" in FLAGS.workdir:
        raise UserError(
            f"--workdir is {FLAGS.workdir!r}; it must be a path that all hosts share, such as a "
            "mounted bucket (docs/launch.md)"
        )
    config = parse(typed_config.load(FLAGS.config, FLAGS.set))
    profiled = profiling.parse_steps(FLAGS.profile_steps, config.num_steps)
    workdir = Path(FLAGS.workdir).absolute()
    start_processes({"workdir": str(workdir), "config": dataclasses.asdict(config)})
    startup.done("configs and processes")
    with processes.failing_at_once():
        finished = run(config, workdir, startup, profiled)
    if not finished:
        sys.exit(STOPPED)


def start_processes(settings: dict[str, Any]) -> None:
    """Joins the other processes that the flags name, if any; all must have equal `settings`."""
    if FLAGS.coordinator:
        job = processes.Job(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    elif FLAGS.distributed:
        job = processes.discover(FLAGS.join_timeout)
    elif FLAGS.num_processes != 1:
        raise UserError(f"--num_processes is {FLAGS.num_processes}; it needs --coordinator")
    else:
        return
    processes.join(job, settings, FLAGS.join_timeout, FLAGS.heartbeat_timeout)


def run(config: Config, workdir: Path, startup: Startup, profiled: Sequence[int]) -> bool:
    """Builds the experiment, opens its data and trains; see `training.loop.train`."""
    experiment = experiments.build(config)
    experiment.check_fits(memory.device_memory())
    startup.done("network")
    # TensorFlow is most of a cold start, so a bad config must fail before this import.
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader, build
        from imagen_jax.training import loop
    startup.done("imports")
    if jax.process_index() == 0:
        build(config)
    processes.wait_for_all("data")
    startup.done("data building")
    reader = Reader(config)
    startup.done("data opening")
    stop = processes.StopRequest()
    return loop.train(experiment, reader, workdir, stop, startup, profiled)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
