"""Trains one stage of the cascade.

    python -m imagen_jax.train --config=configs/demo.py

--config.KEY=VALUE sets any key of the config, for example --config.model.embed_dim=64. To resume
from the newest checkpoint, run the same command again. The workdir receives config.json,
metrics.jsonl, TensorBoard events, checkpoints/ and samples/.

Exit codes: 0 after the last step; 75 after a stop that saved a checkpoint (SIGTERM, Ctrl-C); 2 for
bad input; 65 if every checkpoint is damaged; 70 if training diverges; 74 if the workdir cannot be
written or has disappeared.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from imagen_jax.common import cli, typed_config
from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import STOPPED, UserError
from imagen_jax.common.files import check_folder
from imagen_jax.training.startup import Startup, process_age

if TYPE_CHECKING:
    from imagen_jax.config import Config
    from imagen_jax.stage import Stage
    from imagen_jax.training.periodic import Evaluation
    from imagen_jax.training.reader import Reader

FLAGS = flags.FLAGS

# Share of a machine's memory that training on its CPU may fill; Python, TensorFlow and the reader
# need the rest. Without this margin, a run that barely fits would be killed, not refused.
CPU_SHARE = 0.8


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    cli.define_config_flags(
        None,
        "Config file, for example configs/demo.py or configs/base64.py:tiny, or the config.json of "
        "a run.",
    )
    flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run; created if missing (default: runs/<name of the config file>, with "
        "its argument, such as runs/base64_tiny; required with several processes).",
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "Join the other hosts of a job that JAX can discover (Cloud TPU VM, GKE, SLURM).",
    )
    flags.DEFINE_string("coordinator", "", "host:port of process 0, if JAX cannot discover it.")
    flags.DEFINE_integer("num_processes", 1, "Number of processes; needs --coordinator.")
    flags.DEFINE_integer("process_id", 0, "Index of this process; needs --coordinator.")
    flags.DEFINE_integer("join_timeout", 300, "Seconds to wait for all processes to join.")
    flags.DEFINE_integer(
        "heartbeat_timeout", 100, "Seconds of silence after which a process counts as dead."
    )
    flags.DEFINE_string(
        "profile_steps",
        "",
        "FIRST:LAST, inclusive: trace these steps into WORKDIR/profile, for XProf.",
    )
    flags.DEFINE_integer(
        "replay_step",
        None,
        "Repeat this step from the newest checkpoint before it, print its metrics as JSON and "
        "stop; changes nothing in the workdir.",
        lower_bound=1,
    )
    cli.define_cache_flag()


def main(argv: Sequence[str]) -> None:
    """Checks the flags, the config, the workdir and the data, in this order, then trains."""
    del argv
    startup = Startup(process_age())
    workdir = check_flags()
    values = typed_config.load(FLAGS.config, FLAGS.set)

    # Later imports are in the functions that use them, so that bad input is reported before JAX and
    # TensorFlow are imported.
    from imagen_jax.config import parse
    from imagen_jax.training import profiling

    config = parse(values)
    check_evals(config)
    profiled = profiling.parse_steps(FLAGS.profile_steps, config.num_steps)
    if (FLAGS.replay_step or 0) > config.num_steps:
        allowed = f"1 to {config.num_steps} (config.num_steps)"
        raise UserError(f"--replay_step is {FLAGS.replay_step}; allowed: {allowed}")
    check_folder(workdir, "workdir")
    if config.init.workdir:
        from imagen_jax.runs.warm_start import check_source

        check_source(config.init, workdir)
    check_data(config)
    if not FLAGS.workdir:
        cli.log.info("workdir: %s (--workdir chooses another)", workdir)

    from imagen_jax.devices import compilation, processes

    startup.done("imports")
    start_processes({"workdir": str(workdir), "config": dataclasses.asdict(config)})
    compilation.use_cache(FLAGS.compilation_cache)
    startup.done("configs and processes")
    with processes.failing_at_once():
        finished = run(config, workdir, startup, profiled)
    if not finished:
        sys.exit(STOPPED)


def check_flags() -> Path:
    """Checks the flags that need no config; returns the workdir."""
    if not FLAGS.config:
        raise UserError("--config=FILE is needed, for example --config=configs/demo.py")
    if FLAGS.num_processes != 1 and not FLAGS.coordinator:
        raise UserError(f"--num_processes is {FLAGS.num_processes}; it needs --coordinator")
    if not FLAGS.workdir and (FLAGS.distributed or FLAGS.coordinator):
        raise UserError(
            "--workdir=DIR is needed with several processes; it must be a path that all hosts "
            "share (docs/launch.md)"
        )
    from imagen_jax.runs.workdir import RUNS, check_trainable

    workdir = FLAGS.workdir or f"{RUNS}/{typed_config.run_name(FLAGS.config)}"
    check_trainable(workdir)
    return to_path(workdir, absolute=True)


def check_evals(config: Config) -> None:
    """Raises UserError if config.evals names a metric that training cannot measure."""
    if config.evaluations:
        from imagen_jax.evaluation import during

        during.check_names(config.evaluations)


def check_data(config: Config) -> None:
    """Checks that the data are there, or will be drawn.

    Raises:
      UserError: they are missing. The message has the command that prepares them and, if there is
        one, a config that draws its own.
    """
    from data_pipelines.reading.check import check_prepared

    try:
        check_prepared(config)
    except UserError as e:
        tiny = f"{FLAGS.config}:tiny"
        try:
            typed_config.load(tiny)
        except UserError:  # the config has no such argument
            raise e from None
        raise UserError(f"{e}; or try --config={tiny}, which draws its own data") from e


def start_processes(settings: dict[str, Any]) -> None:
    """Joins the other processes that the flags name, if any; all must have equal `settings`."""
    from imagen_jax.devices import processes

    if FLAGS.coordinator:
        job = processes.Job(FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id)
    elif FLAGS.distributed:
        job = processes.discover(FLAGS.join_timeout)
    else:
        return
    processes.join(job, settings, FLAGS.join_timeout, FLAGS.heartbeat_timeout)


def run(config: Config, workdir: Path, startup: Startup, profiled: Sequence[int]) -> bool:
    """Builds the experiment, opens its data and trains; see `training.loop.train`."""
    import jax

    from imagen_jax.devices import memory, processes
    from imagen_jax.training import experiment as experiments

    startup.done("imports")
    experiment = experiments.build(config)
    available = memory.device_memory()
    if jax.default_backend() == "cpu":
        available *= CPU_SHARE
    experiment.check_fits(available)
    startup.done("network")
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader, build
        from imagen_jax.training import loop
    startup.done("imports")
    with processes.stopping_at_once():
        if jax.process_index() == 0:
            build(config)
        processes.wait_for_all("data")
        startup.done("data building")
        reader = Reader(config)
        startup.done("data opening")
    if step := FLAGS.replay_step:
        print_metrics(loop.replay(experiment, reader, workdir, step))
        return True
    stop = processes.StopRequest()
    evals = evaluations(experiment.stage, reader)
    return loop.train(experiment, reader, workdir, stop, startup, profiled, evals)


def evaluations(stage: Stage, reader: Reader) -> dict[str, Evaluation]:
    """Returns what training calls for each entry of config.evals."""
    if not stage.config.evaluations:
        return {}
    from data_pipelines.scenes.check import check_example
    from imagen_jax.evaluation import during

    return during.evaluations(stage, reader.examples, check_example)


def print_metrics(metrics: dict[str, Any]) -> None:
    """Prints the metrics of one step as a line of JSON, on process 0."""
    import jax

    if jax.process_index() == 0:
        print(json.dumps({name: value.tolist() for name, value in metrics.items()}))


if __name__ == "__main__":
    from imagen_jax.devices.host_memory import keep_freed_memory

    keep_freed_memory()  # not in `main`, because it lasts as long as the process
    define_flags()
    cli.run(main)
