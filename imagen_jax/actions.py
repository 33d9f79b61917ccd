"""What a training run does besides training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from imagen_jax import cascade, pictures
from imagen_jax.checkpoint import Checkpoints
from imagen_jax.cli import log


class Actions:
    """Evaluates, samples and saves, each at its interval; ends a profile; tells of the start."""

    def __init__(
        self, built, workdir: Path, checkpoints: Checkpoints, logger, profile, startup, offset: int
    ):
        from imagen_jax import data

        config = built.config
        self._built, self._workdir, self._checkpoints = built, workdir, checkpoints
        self._logger, self._offset = logger, offset
        self.profile, self._startup = profile, startup
        self._eval_batches = (
            data.eval_batches(config, *built.batch_share)
            if config.eval_every and config.eval_batches
            else []
        )
        self._sample_batch = cascade.batch_size(config.unet.image_size)
        self._prompts = (
            data.examples(config, config.data.sample_split, config.num_samples)
            if config.sample_every
            else []
        )

    def started(self, step: int, metrics: Any) -> None:
        """Waits for the first step, and tells where the time until then went."""
        jax.block_until_ready(metrics)
        self._startup.done("first step")
        log.info(self._startup.summary())
        self._logger.write(step, self._startup.metrics())

    def due(self, step: int) -> list:
        """The actions for this step; all of them at the last one."""
        config = self._built.config
        last = step == config.num_steps
        table = (
            (config.checkpoint_every or last, config.checkpoint_every, self.save),
            (self._eval_batches, config.eval_every, self.evaluate),
            (self._prompts, config.sample_every, self.sample),
        )
        acts = [act for on, every, act in table if on and (last or step % every == 0)]
        return [self.profile.stop, *acts] if self.profile.ends(step) else acts

    def save(self, step: int, state: Any) -> None:
        """A checkpoint of the state and of the place in the data."""
        examples = step * self._built.config.batch_size + self._offset
        self._checkpoints.save(step, state, {"examples": examples}, self._built.config.identity)

    def evaluate(self, step: int, state: Any) -> None:
        """The loss of the EMA weights on held-out data, with the same noise every time."""
        loss = self._built.held_out_loss(state.ema, self._eval_batches)
        self._logger.write(step, {"eval_loss": loss})
        log.info("step %d  eval loss %.4f", step, loss)

    def sample(self, step: int, state: Any) -> None:
        """A grid drawn with the EMA weights, always from the same prompts and seeds.

        One of super-resolution shows what it was given, what it drew, and the true image.
        """
        from imagen_jax import data

        seeds = np.arange(len(self._prompts), dtype=np.uint32)
        cond = data.stack_text(self._prompts)
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
