"""What the denoiser is conditioned on: the prompt, and the low-resolution image it enlarges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_dtypes import bfloat16

from imagen_jax.diffusion.process import Cond, Schedule, q_sample, seed_keys, to_float

# Of a seed's noise: the solvers have stream 0, inpainting has 1 and 2.
AUGMENTATION_STREAM = 3


def drop_text(cond: Cond, drop_b: jax.Array) -> Cond:
    """Replaces the prompt by the null prompt where drop_b is True (caption dropout, guidance).

    cond["text"] is [B, T, D], cond["text_mask"] bool [B, T], drop_b bool [B]. The null prompt is a
    single token of zeros: nothing of the prompt stays, not even its length. Other keys pass.
    """
    text_btd, mask_bt = cond["text"], cond["text_mask"]
    null_bt = jnp.broadcast_to(jnp.arange(mask_bt.shape[1])[None, :] == 0, mask_bt.shape)
    return {
        **cond,
        "text": jnp.where(drop_b[:, None, None], 0, text_btd),
        "text_mask": jnp.where(drop_b[:, None], null_bt, mask_bt),
    }


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


def augment(low_res_bhwc: jax.Array, aug_level_b: jax.Array, key: jax.Array) -> jax.Array:
    """Noise conditioning augmentation: q_sample at the cosine schedule's t = aug_level.

    low_res_bhwc: what a super-resolution stage reads; aug_level_b: [B] in [0, 1], where 0 leaves
    the image as it is (to e^-10) and 1 leaves nothing of it. key: one for the batch (training), or
    one per example, [B] (sampling: then none depends on its batch). Source: figure A.32.
    """
    keys_b = jax.random.split(key, low_res_bhwc.shape[0]) if key.ndim == 0 else key
    eps_bhwc = jax.vmap(lambda k: jax.random.normal(k, low_res_bhwc.shape[1:]))(keys_b)
    return q_sample(low_res_bhwc, eps_bhwc, Schedule("cosine").log_snr(aug_level_b))


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


class TextPart(NamedTuple):
    """One of the text encoders: its name or folder, width, and most tokens."""

    encoder: str
    dim: int
    max_tokens: int


def pad_text(parts: Sequence[TextPart], *captions: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Pads ragged embeddings [n_i, D] to text bfloat16 [B, T, D] and text_mask bool [B, T].

    Takes the captions of each encoder in `parts`. The tokens of an encoder start where the
    max_tokens of the encoders before it end; narrower embeddings are padded with zeros.
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
