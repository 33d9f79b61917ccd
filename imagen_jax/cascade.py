"""The cascade: a base model draws, super-resolution models enlarge (Imagen, sections 2.4 and 4.3).

Here is what joins the stages: how a low-resolution image is made from a training image, the noise
that is put on it (noise conditioning augmentation), and the order of drawing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.diffusion import augment, to_float
from imagen_jax.errors import UserError
from imagen_jax.sampling import SamplerConfig, seed_keys

# Of a seed's noise: the solvers have stream 0, inpainting has 1 and 2.
AUGMENTATION_STREAM = 3


def shrink(x_bhwc: Any, size: int) -> Any:
    """Height and width brought to `size`, a divisor, by the mean of each square of pixels.

    This is the only way in which the project makes a low-resolution image, in training and in
    evaluation, on the host and on the device: an antialiased (area) filter whose squares do not
    overlap, so that shrinking a crop is cropping the shrunk image.
    """
    b, h, w, c = x_bhwc.shape
    return x_bhwc.reshape(b, size, h // size, size, w // size, c).mean((2, 4))


def shrink_pixels(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 [B, H, W, C] -> uint8 [B, size, size, C], see `shrink`."""
    return np.round(shrink(images.astype(np.float32), size)).astype(np.uint8)


def batch_size(image_size: int, base: int = 64) -> int:
    """Images to draw at once: `base` up to 64x64 pixels, fewer of larger ones, for equal memory."""
    return max(1, base * 64**2 // max(64, image_size) ** 2)


def training_condition(x_bhwc: jax.Array, size: int, key: jax.Array) -> dict[str, jax.Array]:
    """What a super-resolution stage learns to enlarge: the image at `size`, noised at random.

    Returns:
      low_res [B, size, size, C], and aug_level [B] ~ U(0, 1), how much noise is on each.
    """
    level_key, noise_key = jax.random.split(key)
    aug_level_b = jax.random.uniform(level_key, x_bhwc.shape[:1])
    low_res = augment(shrink(x_bhwc, size), aug_level_b, noise_key)
    return {"low_res": low_res, "aug_level": aug_level_b}


def sampling_condition(
    low_res_bhwc: jax.Array, aug_level: float, seeds_b: jax.Array
) -> dict[str, jax.Array]:
    """The same for drawing: uint8 pixels noised at one level, each by its own seed."""
    keys_b = seed_keys(seeds_b, AUGMENTATION_STREAM)
    aug_level_b = jnp.full(low_res_bhwc.shape[:1], aug_level)
    low_res = augment(to_float(low_res_bhwc), aug_level_b, keys_b)
    return {"low_res": low_res, "aug_level": aug_level_b}


@dataclasses.dataclass(frozen=True)
class Stage:
    """A trained stage: its Experiment and EMA weights, and how it is to be sampled.

    Attributes:
      name: for progress and messages, usually the workdir; each stage has its own.
      step: of the checkpoint that the weights are from.
      built: the experiment.Experiment.
      params: the weights.
      sampler: steps, guidance, thresholding, aug_level.
      batch_size: images that are drawn at once.
    """

    name: str
    step: int
    built: Any
    params: Any
    sampler: SamplerConfig
    batch_size: int

    @property
    def size(self) -> int:
        """Side of the images it draws, pixels."""
        return self.built.config.full_size

    @property
    def low_res(self) -> int:
        """Side of the images it enlarges, pixels; 0 for a base model."""
        return self.size // self.built.config.upscale if self.built.config.unet.low_res else 0


def check_order(stages: Sequence[Stage], given: int | None = None) -> None:
    """Raises UserError unless each stage enlarges what the one before draws.

    given: side of an image that the first stage is to enlarge; None if it is to draw by itself.
    """
    before, what = given or 0, f"the image of {given} pixels" if given else "nothing"
    for stage in stages:
        if stage.low_res != before:
            needs = f"enlarges {stage.low_res} pixels" if stage.low_res else "is a base model"
            raise UserError(f"--workdir: {stage.name} {needs}, but before it comes {what}")
        before, what = stage.size, f"{stage.name}, which draws {stage.size}"


def draw(
    stages: Sequence[Stage],
    seeds: np.ndarray,
    conds: Sequence[dict[str, np.ndarray]],
    given: dict[str, np.ndarray] | None = None,
    progress: Callable[[Stage, int], None] | None = None,
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
    drawn: list[np.ndarray] = []
    for stage, cond in zip(stages, conds, strict=True):
        low_res = drawn[-1] if drawn else _repeated(given.get("low_res"), len(seeds))
        told = {
            **cond,
            **({} if low_res is None else {"low_res": low_res}),
            **{k: _repeated(v, len(seeds)) for k, v in _to_edit(stage, given).items()},
        }
        report = functools.partial(progress, stage) if progress else None
        settings = (stage.sampler, stage.batch_size, report)
        drawn.append(stage.built.draw(stage.params, seeds, told, *settings))
    return drawn


def _repeated(x: np.ndarray | None, times: int) -> np.ndarray | None:
    return None if x is None else np.repeat(x[None], times, axis=0)


def _to_edit(stage: Stage, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The image and mask at the size that a stage draws, if it is to read them."""
    if "image" not in given or (stage.low_res and "mask" not in given):
        return {}
    parts = {"image": shrink_pixels(given["image"][None], stage.size)[0]}
    if "mask" in given:
        # A pixel is painted anew if any of those that it stands for is.
        parts["mask"] = shrink(given["mask"][None].astype(np.float32), stage.size)[0] > 0
    return parts
