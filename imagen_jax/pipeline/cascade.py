"""The cascade: a base model samples, super-resolution stages enlarge (sections 2.4 and 4.3)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from imagen_jax.common.errors import UserError
from imagen_jax.diffusion.conditioning import shrink, shrink_pixels
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.stage import Params, Stage


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A trained stage: its Experiment and EMA weights, and how it is to be sampled.

    Attributes:
      name: for progress and messages, usually the workdir; each stage has its own.
      step: of the checkpoint that the weights are from.
      stage: the stage.Stage.
      params: the weights.
      sampler: steps, guidance, thresholding, aug_level.
      batch_size: images that are samples at once.
    """

    name: str
    step: int
    stage: Stage
    params: Params
    sampler: SamplerConfig
    batch_size: int

    @property
    def size(self) -> int:
        """Side of the images it draws, pixels."""
        return self.stage.config.full_size

    @property
    def low_res(self) -> int:
        """Side of the images it enlarges, pixels; 0 for a base model."""
        return self.size // self.stage.config.upscale if self.stage.config.unet.low_res else 0


def check_order(stages: Sequence[TrainedStage], given: int | None = None) -> None:
    """Raises UserError unless each stage enlarges what the one before draws.

    given: side of an image that the first stage is to enlarge; None if it is to draw by itself.
    """
    before, what = given or 0, f"the image of {given} pixels" if given else "nothing"
    for stage in stages:
        if stage.low_res != before:
            needs = f"enlarges {stage.low_res} pixels" if stage.low_res else "is a base model"
            raise UserError(f"--workdir: {stage.name} {needs}, but before it comes {what}")
        before, what = stage.size, f"{stage.name}, which draws {stage.size}"


def sample(
    stages: Sequence[TrainedStage],
    seeds: np.ndarray,
    conds: Sequence[dict[str, np.ndarray]],
    given: dict[str, np.ndarray] | None = None,
    progress: Callable[[TrainedStage, int], None] | None = None,
) -> list[np.ndarray]:
    """Draws one image per seed with each stage, every one enlarging those of the stage before.

    Args:
      seeds: uint32 [N]; a sample depends on its own seed and prompt only.
      conds: for each stage, text [N, T, D] and text_mask [N, T], and what else it is to be told.
      given: for all samples, either low_res uint8 [h, w, 3], which the first stage enlarges; or
        image uint8 [S, S, 3] at the size of the last stage, which the base model starts from, and
        with a mask bool [S, S, 1] all stages paint only where that is True.
      progress: told the stage and the number of images after each of its batches.

    Returns:
      For each stage, uint8 [N, H, W, 3].
    """
    given = given or {}
    samples: list[np.ndarray] = []
    for stage, cond in zip(stages, conds, strict=True):
        low_res = samples[-1] if samples else _repeated(given.get("low_res"), len(seeds))
        told = {
            **cond,
            **({} if low_res is None else {"low_res": low_res}),
            **{k: _repeated(v, len(seeds)) for k, v in _to_edit(stage, given).items()},
        }
        report = functools.partial(progress, stage) if progress else None
        settings = (stage.sampler, stage.batch_size, report)
        samples.append(stage.stage.sample(stage.params, seeds, told, *settings))
    return samples


def _repeated(x: np.ndarray | None, times: int) -> np.ndarray | None:
    return None if x is None else np.repeat(x[None], times, axis=0)


def _to_edit(stage: TrainedStage, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The image and mask at the size that a stage draws, if it is to read them."""
    if "image" not in given or (stage.low_res and "mask" not in given):
        return {}
    parts = {"image": shrink_pixels(given["image"][None], stage.size)[0]}
    if "mask" in given:
        # A pixel is painted anew if any of those that it stands for is.
        parts["mask"] = shrink(given["mask"][None].astype(np.float32), stage.size)[0] > 0
    return parts
