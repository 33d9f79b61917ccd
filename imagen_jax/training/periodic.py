"""Periodic actions of a run: evaluate, sample, save a checkpoint or snapshot, end a profile."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imagen_jax.common import pictures
from imagen_jax.common.buckets import is_remote
from imagen_jax.common.cli import log
from imagen_jax.devices import processes
from imagen_jax.diffusion.conditioning import shrink_pixels, stack_text
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.local_checkpoints import LocalCheckpoints
from imagen_jax.runs.state import RunState
from imagen_jax.runs.workdir import CONFIG, SAMPLES, check_present
from imagen_jax.stage import batch_size
from imagen_jax.training.experiment import Experiment
from imagen_jax.training.goodput import Goodput
from imagen_jax.training.guard import Guard
from imagen_jax.training.metrics import MetricLogger
from imagen_jax.training.profiling import Profile
from imagen_jax.training.reader import Reader
from imagen_jax.training.startup import Startup
from imagen_jax.training.step import TrainState, all_finite

WATCH_S, WATCH_BUCKET_S = 1.0, 60.0  # seconds between looks at the workdir

Action = Callable[[int, TrainState], None]
Evaluation = Callable[[Any], dict[str, float]]  # weights -> scalars to log


def _spends(part: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates an action: its time counts as a part of the goodput."""

    def decorate(act: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(act)
        def counted(self: Actions, *args: Any) -> None:
            with self.goodput.spending(part):
                act(self, *args)

        return counted

    return decorate


class Actions:
    """The periodic actions of a run, each a function of (step, state)."""

    def __init__(
        self,
        experiment: Experiment,
        reader: Reader,
        workdir: Path,
        checkpoints: Checkpoints,
        local: LocalCheckpoints,
        snapshots: Checkpoints | None,
        logger: MetricLogger,
        profile: Profile,
        startup: Startup,
        guard: Guard,
        run_state: RunState,
        goodput: Goodput,
        offset: int,
        evals: Mapping[str, Evaluation] = {},
    ):
        """Reads the held-out batches and the captions to sample.

        Args:
          snapshots: of the averages for post-hoc EMA; None if the run keeps none.
          offset: examples consumed minus step x batch_size; not 0 if batch_size has changed or the
            run has gone back.
          evals: the evaluations of the config section `evals`, by name.
        """
        config = experiment.config
        self._evals = evals
        self._config, self._stage, self._workdir = config, experiment.stage, workdir
        self._checkpoints, self._local, self._snapshots = checkpoints, local, snapshots
        self._saved_offset = offset
        self._logger, self.goodput, self.offset = logger, goodput, offset
        self.guard, self._run_state = guard, run_state
        self._last_save = time.monotonic()
        checkpoints.scores = logger.scores
        self._started, self._watched = False, 0.0
        self._all_finite = jax.jit(all_finite, out_shardings=experiment.replicated)
        self.profile, self._startup = profile, startup
        self._eval_batches = (
            reader.eval_batches(*experiment.batch_share)
            if config.eval_every and config.eval_batches
            else []
        )
        self._sample_batch = batch_size(config.unet.image_size)
        self._prompts = (
            reader.examples(config.data.sample_split, config.num_samples)
            if config.sample_every
            else []
        )

    def started(self, step: int, metrics: Any) -> None:
        """Waits for the first step, then logs how long each part of the startup took.

        Does nothing when called again, after a return to a checkpoint.
        """
        if self._started:
            return
        self._started = True
        jax.block_until_ready(metrics)
        self._startup.done("first step")
        self.goodput.begin()
        log.info(self._startup.summary())
        self._logger.write(step, self._startup.metrics())

    def watch(self, step: int) -> None:
        """Raises RunError at once, not at the next save, if a save failed or the workdir is gone.

        Reads the workdir once a second: on a network share that takes a millisecond. A bucket takes
        longer and is read once a minute.
        """
        self._checkpoints.check()
        self._run_state.beat(step)
        self.goodput.beat(step)
        every = WATCH_BUCKET_S if is_remote(self._workdir) else WATCH_S
        if time.monotonic() > self._watched + every:
            self._watched = time.monotonic()
            # Only process 0 has written into the workdir; others may see its files later.
            main = jax.process_index() == 0
            check_present(self._workdir / CONFIG if main else self._workdir)

    def report_spike(self, step: int, loss: float) -> None:
        """Logs a step whose loss is a spike, with all that repeats it."""
        size = self._config.batch_size
        end = step * size + self.offset
        log.warning(
            "step %d  the loss is a spike: %.4f; seed %d, examples %d to %d of the run; repeat it "
            "with --replay_step=%d",
            step, loss, self._config.seed, end - size, end - 1, step,
        )  # fmt: skip

    def due(self, step: int) -> list[Action]:
        """Returns the actions to run after this step; the last step runs all that are on."""
        config = self._config
        last = step == config.num_steps
        table = (
            (self._snapshots, config.ema.snapshot_every, self.save_snapshot),
            (not last and self._save_due(step), 1, self.save),
            (self._eval_batches, config.eval_every, self.evaluate),
            (self._prompts, config.sample_every, self.sample),
        )
        acts = [act for on, every, act in table if on and (last or step % every == 0)]
        acts += [
            functools.partial(self.measure, name)
            for name in self._evals
            if last or step % config.evaluations[name].every == 0
        ]
        # The last, because a run that is killed after its last checkpoint has nothing to resume.
        acts += [self.save] * last
        return [self.profile.stop, *acts] if self.profile.ends(step) else acts

    def _save_due(self, step: int) -> bool:
        """Returns whether to save after `step`, the same in every process."""
        config, seconds = self._config, self._config.checkpoint.every_s
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            return True
        if not seconds or step % config.log_every:
            return False
        due = time.monotonic() >= self._last_save + seconds
        with jax.transfer_guard("allow"):
            return processes.from_first([int(due)]) == [1]

    def catch_up(self, step: int, state: TrainState) -> None:
        """Evaluates and samples at the step that the run resumes from, where that is missing.

        A stop only saves, and a kill may come after the save.
        """
        config, missing = self._config, []
        if not step:
            return
        if self._eval_batches and step % config.eval_every == 0:
            missing += [0] * ("eval_loss" not in self._logger.written)
        if self._prompts and step % config.sample_every == 0:
            missing += [1] * (not self._grid(step).exists())
        for number in processes.from_first(missing):
            (self.evaluate, self.sample)[number](step, state)
            self._startup.done("evaluation")

    @_spends("checkpoints")
    def save(self, step: int, state: TrainState) -> None:
        """Saves a checkpoint of the state, the position in the data and the steps not logged yet.

        While steps are skipped, the last step alone saves: a run must go back to before them.
        """
        if not self.guard.steady and step < self._config.num_steps:
            log.warning("step %d  no checkpoint: the last steps were skipped", step)
            return
        if not jax.device_get(self._all_finite(state)):
            log.warning("step %d  no checkpoint: the state is not finite", step)
            self.guard.diverge(step)
            return
        self._last_save, self._saved_offset = time.monotonic(), self.offset
        self._save_in(self._checkpoints, step, state)

    def local_due(self, step: int, due: list[Action]) -> bool:
        """Returns whether to save a local checkpoint after `step`, if these actions are due.

        None at the last step: the run is then complete in the workdir.
        """
        local = self._local
        on = local.directory and step < self._config.num_steps
        return bool(on and (local.due(step) or self.save in due))

    @_spends("checkpoints")
    def save_local(self, step: int, state: TrainState) -> None:
        """Saves a local checkpoint, unless a step was skipped or the state is not finite.

        A run that has gone back saves none before its next checkpoint: a killed run then goes back
        the same way again, with or without local checkpoints.
        """
        gone_back = self.offset != self._saved_offset
        if gone_back or not self.guard.steady or not jax.device_get(self._all_finite(state)):
            return
        if self._snapshots:
            self._snapshots.wait()  # a run that resumes here does not save them again
        self._save_in(self._local, step, state)

    def _save_in(self, to: Checkpoints | LocalCheckpoints, step: int, state: TrainState) -> None:
        position = {**self._position(step), "window": self._logger.window}
        begin = time.monotonic()
        self._logger.upload()  # a run that resumes from this checkpoint needs the lines before it
        to.save(step, state, position, self._config.identity)
        self._logger.saving += time.monotonic() - begin

    @_spends("checkpoints")
    def save_snapshot(self, step: int, state: TrainState) -> None:
        """Saves a snapshot of the averages for post-hoc EMA."""
        position, identity = self._position(step), self._config.identity
        self._snapshots.save(step, state.averages, position, identity)

    def _position(self, step: int) -> dict[str, int]:
        return {"examples": step * self._config.batch_size + self.offset}

    @_spends("evaluation")
    def evaluate(self, step: int, state: TrainState) -> None:
        """Logs the held-out losses of the EMA weights, always with the same noise."""
        losses = self._stage.held_out_losses(state.ema, self._eval_batches)
        self._logger.write(step, losses)
        log.info(
            "step %d  eval loss %.4f, with the null prompt %.4f",
            step, losses["eval_loss"], losses["eval_loss_null"],
        )  # fmt: skip

    @_spends("evaluation")
    def measure(self, name: str, step: int, state: TrainState) -> None:
        """Logs the figures of an evaluation of the EMA weights."""
        with jax.transfer_guard("allow"):
            scalars = self._evals[name](state.ema)
        self._logger.write(step, scalars)
        figures = ", ".join(f"{key} {value:.4f}" for key, value in scalars.items())
        log.info("step %d  %s", step, figures)

    @_spends("evaluation")
    def sample(self, step: int, state: TrainState) -> None:
        """Saves a grid sampled with the EMA weights, always from the same prompts and seeds.

        For super-resolution, each cell shows the input, the sample and the true image.
        """
        seeds = np.arange(len(self._prompts), dtype=np.uint32)
        cond = stack_text(self._prompts)
        if size := self._config.unet.low_res:
            true = np.stack([p["image"] for p in self._prompts])
            cond["low_res"] = shrink_pixels(true, size)
        images = self._stage.sample(state.ema, seeds, cond, batch_size=self._sample_batch)
        if size:
            inputs = cond["low_res"].repeat(self._config.upscale, 1)
            inputs = inputs.repeat(self._config.upscale, 2)
            images = np.concatenate([inputs, images, true], axis=2)
        if jax.process_index() == 0:
            sheet = pictures.grid(images, [p["caption"] for p in self._prompts])
            path = self._grid(step)
            pictures.save(sheet, path)
            self._logger.writer.write_images(step, {"samples": np.asarray(sheet)[None]})
            log.info("step %d  samples: %s", step, path)

    def _grid(self, step: int) -> Path:
        return self._workdir / SAMPLES / f"step_{step:08d}.png"
