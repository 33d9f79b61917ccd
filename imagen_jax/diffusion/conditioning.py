"""Conditioning of the denoiser: the text, and the low-resolution image of super-resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_dtypes import bfloat16

from imagen_jax.diffusion.process import Cond, Schedule, q_sample, seed_keys, to_float

# Noise stream of a seed, see process.seed_keys: the solvers use 0, inpainting 1 and 2.
AUGMENTATION_STREAM = 3


def drop_text(cond: Cond, drop_b: jax.Array) -> Cond:
    """Replaces the prompt by the null prompt where drop_b is True.

    Used for caption dropout in training and for guidance (sections 2.2, 4.1). The null prompt is a
    single token of zeros, so not even the length of the prompt shows.

    Args:
      cond: text [B, T, D], text_mask bool [B, T]; other keys are passed through.
      drop_b: bool [B].
    """
    text_btd, mask_bt = cond["text"], cond["text_mask"]
    null_bt = jnp.broadcast_to(jnp.arange(mask_bt.shape[1])[None, :] == 0, mask_bt.shape)
    return {
        **cond,
        "text": jnp.where(drop_b[:, None, None], 0, text_btd),
        "text_mask": jnp.where(drop_b[:, None], null_bt, mask_bt),
    }


def shrink(x_bhwc: Any, size: int) -> Any:
    """Averages square blocks of pixels until height and width are `size`, which must divide both.

    Every low-resolution image of the project is made this way: in training and evaluation, on the
    host and on the device. It is an antialiasing (area) filter whose blocks do not overlap, so
    shrinking a crop gives the same pixels as cropping the shrunk image.
    """
    b, h, w, c = x_bhwc.shape
    return x_bhwc.reshape(b, size, h // size, size, w // size, c).mean((2, 4))


def shrink_pixels(images: np.ndarray, size: int) -> np.ndarray:
    """Applies `shrink` to pixels: uint8 [B, H, W, C] -> uint8 [B, size, size, C]."""
    return np.round(shrink(images.astype(np.float32), size)).astype(np.uint8)


def augment(low_res_bhwc: jax.Array, aug_level_b: jax.Array, key: jax.Array) -> jax.Array:
    """Applies noise conditioning augmentation: q_sample, cosine schedule, at t = aug_level.

    Source: figure A.32.

    Args:
      low_res_bhwc: the input image of a super-resolution stage, in [-1, 1].
      aug_level_b: [B] in [0, 1]. 0 adds noise of only sigma = e^-10; 1 leaves nothing of the image.
      key: one key for the batch (training), or one per example, [B] (sampling, where an example
        must not depend on its batch).
    """
    keys_b = jax.random.split(key, low_res_bhwc.shape[0]) if key.ndim == 0 else key
    eps_bhwc = jax.vmap(lambda k: jax.random.normal(k, low_res_bhwc.shape[1:]))(keys_b)
    return q_sample(low_res_bhwc, eps_bhwc, Schedule("cosine").log_snr(aug_level_b))


def training_condition(x_bhwc: jax.Array, size: int, key: jax.Array) -> dict[str, jax.Array]:
    """Builds the conditioning of a super-resolution stage from training images (figure A.32).

    Returns:
      low_res [B, size, size, C], the shrunk images with noise added, and aug_level [B] ~ U(0, 1),
      the noise level of each example.
    """
    level_key, noise_key = jax.random.split(key)
    aug_level_b = jax.random.uniform(level_key, x_bhwc.shape[:1])
    low_res = augment(shrink(x_bhwc, size), aug_level_b, noise_key)
    return {"low_res": low_res, "aug_level": aug_level_b}


def sampling_condition(
    low_res_bhwc: jax.Array, aug_level: float, seeds_b: jax.Array
) -> dict[str, jax.Array]:
    """Builds the same conditioning for sampling: one aug_level for all, noise from each seed.

    Args:
      low_res_bhwc: uint8 pixels at the stage's input size.
      aug_level: noise level, 0 to 1.
      seeds_b: uint32 [B].
    """
    keys_b = seed_keys(seeds_b, AUGMENTATION_STREAM)
    aug_level_b = jnp.full(low_res_bhwc.shape[:1], aug_level)
    low_res = augment(to_float(low_res_bhwc), aug_level_b, keys_b)
    return {"low_res": low_res, "aug_level": aug_level_b}


class TextPart(NamedTuple):
    """One text encoder: its name or folder, embedding width, and maximum number of tokens."""

    encoder: str
    dim: int
    max_tokens: int


def pad_text(parts: Sequence[TextPart], *captions: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Pads ragged embeddings to text bfloat16 [B, T, D] and text_mask bool [B, T].

    T is the sum of max_tokens over the encoders, D the largest dim. Each encoder has max_tokens
    positions of its own, in the order of `parts`; narrower embeddings are padded with zeros.

    Args:
      parts: the encoders.
      *captions: for each encoder, the embeddings of the B captions, [n_i, dim].
    """
    tokens, width = sum(part.max_tokens for part in parts), max(part.dim for part in parts)
    text = np.zeros((len(captions[0]), tokens, width), bfloat16)
    mask = np.zeros(text.shape[:2], bool)
    start = 0
    for part, embeddings in zip(parts, captions, strict=True):
        place = slice(start, start + part.max_tokens)
        for i, embedding in enumerate(embeddings):
            text[i, place, : part.dim][: len(embedding)] = embedding
            mask[i, place][: len(embedding)] = True
        start = place.stop
    return {"text": text, "text_mask": mask}


def stack_text(examples: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Stacks the text [N, T, D] and text_mask [N, T] of examples."""
    return {k: np.stack([row[k] for row in examples]) for k in ("text", "text_mask")}
