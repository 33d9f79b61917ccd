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
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from imagen_jax import cascade, cli, distributed, experiment, pictures, sharding
from imagen_jax import config as config_files
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.cli import log
from imagen_jax.errors import UserError
from imagen_jax.files import replacing
from imagen_jax.run_config import Config, parse

FLAGS = flags.FLAGS

# EX_TEMPFAIL of sysexits.h, "try again": what restarts a run must tell a preemption from its end.
STOPPED = 75


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    flags.DEFINE_string(
        "config", None, "Config file, for example configs/demo.py or configs/base64.py:tiny."
    )
    flags.DEFINE_multi_string(
        "set", [], "key=value that overrides the config; --config.key=value is the same."
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


def main(argv: Sequence[str]) -> None:
    """Parses flags, then trains."""
    del argv
    if not FLAGS.config or not FLAGS.workdir:
        raise UserError("--config=FILE and --workdir=DIR are both needed (see --help)")
    if "://" in FLAGS.workdir:
        raise UserError(
            f"--workdir is {FLAGS.workdir!r}; it must be a path that all hosts share, such as a "
            "mounted bucket (docs/launch.md)"
        )
    config = parse(config_files.load(FLAGS.config, FLAGS.set))
    workdir = Path(FLAGS.workdir).absolute()
    start_processes({"workdir": str(workdir), "config": dataclasses.asdict(config)})
    with distributed.failing_at_once():
        finished = train(config, workdir, distributed.StopRequest())
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


def train(config: Config, workdir: Path, stop: distributed.StopRequest) -> bool:
    """Runs until `num_steps`, or until `stop` asks, and leaves a checkpoint of the last step.

    Returns:
      Whether the run is now trained to `num_steps`.
    """
    built = experiment.build(config)
    check_fits(built, device_memory())
    # TensorFlow is most of a cold start; a bad config should fail before it is imported.
    with cli.quiet_imports():
        from imagen_jax import data, metrics

    ensure_data(config)
    distributed.wait_for_all("data")
    data.open_task(config)
    make_workdir(workdir)
    # Closed even if training fails, so that a save under way is finished or cleanly dropped.
    with contextlib.closing(Checkpoints(workdir, config.checkpoint)) as checkpoints:
        state, position = start_or_resume(built, checkpoints)
        write_config(workdir, config)
        start = int(state.step)
        if start >= config.num_steps:
            log.info("already trained for %d steps: %s", start, workdir)
            return True
        host = (jax.process_index(), jax.process_count())
        batches = data.train_batches(config, position["examples"], *host)
        sizes = (config.num_steps, config.batch_size, built.model_flops)
        with contextlib.closing(metrics.MetricLogger(workdir, *sizes)) as logger:
            logger.resume_at(start)
            offset = position["examples"] - start * config.batch_size
            actions = Actions(built, workdir, checkpoints, logger, offset)
            if start == 0:
                log.info("\n%s", metrics.overview(built.abstract_params))
            devices = f"{jax.device_count()} {jax.default_backend()} device(s)"
            log.info("training %s parameters on %s", f"{built.num_params:,}", devices)
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

    Metrics are fetched one step late, so the host never stalls the device.
    """
    config = built.config
    logger.restart_clock()
    pending = None
    with jax.transfer_guard("disallow"):
        for step in range(start + 1, config.num_steps + 1):
            state, metrics = built.step(state, built.put(next(batches)))
            fetch(logger, pending, config.log_every)
            pending = (step, metrics)
            stopping = stop(step)
            due = [actions.save] if stopping else actions.due(step)
            if due:
                ends = stopping or step == config.num_steps
                fetch(logger, pending, config.log_every, force=ends)
                pending = None
                before = time.perf_counter()
                for action in due:
                    action(step, state)
                logger.paused(time.perf_counter() - before)
            if stopping:
                log.info("stopped at step %d; the same command goes on from there", step)
                return step == config.num_steps
    return True


def fetch(logger, pending, log_every: int, force: bool = False) -> None:
    """Hands the metrics of a finished step to the logger, and has it write when a line is due."""
    if pending is None:
        return
    step, metrics = pending
    logger.add(step, metrics)
    if force or step % log_every == 0:
        logger.flush(step)


class Actions:
    """What happens besides training, each at its own interval: evaluate, sample, save."""

    def __init__(self, built, workdir: Path, checkpoints: Checkpoints, logger, offset: int):
        from imagen_jax import data

        config = built.config
        self._built, self._workdir, self._checkpoints = built, workdir, checkpoints
        self._logger, self._offset = logger, offset
        self._eval_batches = (
            data.eval_batches(config, jax.process_index(), jax.process_count())
            if config.eval_every and config.eval_batches
            else []
        )
        self._sample_batch = cascade.batch_size(config.unet.image_size)
        self._prompts = (
            data.examples(config, config.data.sample_split, config.num_samples)
            if config.sample_every
            else []
        )

    def due(self, step: int) -> list:
        """The actions for this step; all of them at the last one."""
        config = self._built.config
        last = step == config.num_steps
        table = (
            (config.checkpoint_every or last, config.checkpoint_every, self.save),
            (self._eval_batches, config.eval_every, self.evaluate),
            (self._prompts, config.sample_every, self.sample),
        )
        return [act for on, every, act in table if on and (last or step % every == 0)]

    def save(self, step: int, state: Any) -> None:
        """A checkpoint of the state and of the place in the data."""
        examples = step * self._built.config.batch_size + self._offset
        self._checkpoints.save(step, state, {"examples": examples}, self._built.config.identity)

    def evaluate(self, step: int, state: Any) -> None:
        """The loss of the EMA weights on held-out data, with the same noise every time."""
        losses = []
        for i, batch in enumerate(self._eval_batches):
            with jax.transfer_guard("allow"):
                loss = self._built.eval_loss(state.ema, self._built.put(batch), jax.random.key(i))
            losses.append(loss)
        loss = float(np.mean(jax.device_get(losses)))
        self._logger.write(step, {"eval_loss": loss})
        log.info("step %d  eval loss %.4f", step, loss)

    def sample(self, step: int, state: Any) -> None:
        """A grid drawn with the EMA weights, always from the same prompts and seeds.

        One of super-resolution shows what it was given, what it drew, and the true image.
        """
        seeds = np.arange(len(self._prompts), dtype=np.uint32)
        cond = {k: np.stack([p[k] for p in self._prompts]) for k in ("text", "text_mask")}
        if size := self._built.config.unet.low_res:
            true = np.stack([p["image"] for p in self._prompts])
            cond["low_res"] = cascade.shrink_pixels(true, size)
        images = self._built.draw(state.ema, seeds, cond, batch_size=self._sample_batch)
        if size:
            given = cond["low_res"].repeat(self._built.config.upscale, 1)
            given = given.repeat(self._built.config.upscale, 2)
            images = np.concatenate([given, images, true], axis=2)
        if jax.process_index() == 0:
            sheet = pictures.grid(images, [p["caption"] for p in self._prompts])
            path = self._workdir / "samples" / f"step_{step:08d}.png"
            pictures.save(sheet, path)
            self._logger.writer.write_images(step, {"samples": np.asarray(sheet)[None]})
            log.info("step %d  samples: %s", step, path)


def device_memory() -> float:
    """Bytes of one device's memory; a CPU's devices share the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return stats.get("bytes_limit", physical / jax.local_device_count())


def check_fits(built, available: float) -> None:
    """Raises UserError, with the figures, if a device of `available` bytes cannot hold the run.

    Counted is what every run needs at the least: weights, EMA, optimizer state, gradients, and the
    input and output of one block at the first level.
    """
    weights = sharding.bytes_per_device(built.abstract_state.params)
    config = built.config
    side, channels = config.unet.first_level
    block = config.batch_size * side**2 * channels * jnp.dtype(config.unet.dtype).itemsize
    activations = 2 * block / (built.batch_ways * config.microbatches)
    # Gradients are as large as the weights.
    needed = built.state_bytes_per_device + weights + activations
    if needed > available:
        raise UserError(
            f"{built.num_params / 1e9:.2f}B parameters at batch {config.batch_size} need at least "
            f"{needed / 2**30:.1f} GiB a device; each of {jax.device_count()} device(s) here has "
            f"{available / 2**30:.1f} GiB: raise config.mesh.fsdp on more devices, lower "
            "config.batch_size, or try the recipe small with --config=configs/base64.py:tiny"
        )


def ensure_data(config: Config) -> None:
    """Draws the embedded scenes if the config says so and they are not there yet."""
    if not config.data.build or jax.process_index() != 0:
        return
    from data_pipelines import writing
    from data_pipelines.scenes.builder import Scenes
    from imagen_jax.text import load_encoder

    data, text = config.data, config.text
    if not data.task.startswith("scenes_"):
        raise UserError(f"config.data.build is True; data.task={data.task} is not a scenes task")
    builder = Scenes(
        data_dir=data.dir,
        resolution=int(data.task.removeprefix("scenes_")),
        counts={"train": data.num_train, "validation": 500, "heldout": 500},
        seed=0,
        encoder=load_encoder(text.encoder, text.max_tokens),
        categories=data.categories,
    )
    writing.prepare(builder)


def make_workdir(workdir: Path) -> None:
    """Makes the workdir, and finds out now whether it can be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as e:
        raise UserError(f"--workdir={workdir} cannot be written: {e.strerror}") from e


def write_config(workdir: Path, config: Config) -> None:
    """Writes config.json, complete with every default."""
    if jax.process_index() == 0:
        with replacing(workdir / "config.json") as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
