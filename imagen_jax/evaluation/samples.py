"""Draws the samples of an evaluation and keeps them on disk, so that it can be interrupted.

The samples of one protocol are in a folder named by its hash: evaluation/samples/<hash>/. A file
has a whole batch, and appears only when it is complete.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from imagen_jax.common.cli import log
from imagen_jax.common.files import replacing, write_json
from imagen_jax.diffusion.conditioning import shrink_pixels
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.evaluation.metric import Example
from imagen_jax.pipeline.cascade import Cascade, Job
from imagen_jax.pipeline.prompts import Request
from imagen_jax.pipeline.trained import TrainedStage
from imagen_jax.stage import batch_size
from imagen_jax.text import load_encoder

BATCH = 64  # samples per batch at 64x64 pixels and below
BLOCK = 512  # records that are read at once


class Lazy(Sequence):
    """A sequence whose items are read in blocks when they are needed.

    Args:
      num: number of items.
      read: (start, stop) -> items.
      block: items per call.
    """

    def __init__(self, num: int, read: Callable[[int, int], Sequence[Any]], block: int = BLOCK):
        self._num, self._size = num, block
        self._block = functools.lru_cache(2)(lambda i: read(i * block, min((i + 1) * block, num)))

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._num))]
        if not -self._num <= index < self._num:
            raise IndexError(index)
        return self._block(index % self._num // self._size)[index % self._num % self._size]


def field(examples: Sequence[Example], key: str) -> Lazy:
    """Returns a field of all examples, such as their images."""
    return Lazy(len(examples), lambda start, stop: [e[key] for e in examples[start:stop]], 1)


class Embedded:
    """A text encoder that looks up captions whose embeddings were prepared with the data.

    Args:
      max_tokens: as of text.TextEncoder.
      embeddings: caption -> bfloat16 [tokens, dim].
    """

    def __init__(self, max_tokens: int, embeddings: Callable[[str], np.ndarray]):
        self.max_tokens, self._embedding = max_tokens, embeddings

    def num_tokens(self, caption: str) -> int:
        """Returns 0: no prepared caption is too long."""
        del caption
        return 0

    def encode(self, captions: Sequence[str]) -> list[np.ndarray]:
        """Returns the embeddings of captions, [tokens, dim] each."""
        return [self._embedding(caption) for caption in captions]

    def truncate(self, caption: str) -> str:
        """Returns the caption."""
        return caption


def encoders(examples: Sequence[Example], captions: Sequence[str], parts: Sequence[Any]):
    """Returns a load_encoder that needs no weights for encoders whose embeddings the examples have.

    Args:
      examples: with text and text_mask, see diffusion.conditioning.pad_text.
      captions: theirs.
      parts: the TextParts that the text was padded for.
    """
    index = {caption: i for i, caption in enumerate(captions)}
    places, start = {}, 0
    for part in parts:
        places[part.encoder] = (slice(start, start + part.max_tokens), part.dim)
        start += part.max_tokens

    def look_up(place: slice, dim: int, caption: str) -> np.ndarray:
        example = examples[index[caption]]
        return example["text"][place, :dim][example["text_mask"][place]]

    def load(encoder: str, max_tokens: int):
        if encoder not in places:
            return load_encoder(encoder, max_tokens)
        return Embedded(max_tokens, functools.partial(look_up, *places[encoder]))

    return load


class Stored(Sequence):
    """Samples in files, uint8 [H, W, 3] each, read one at a time."""

    def __init__(self, paths: Sequence[Path], num: int, size: int):
        self._paths, self._num, self._size = list(paths), num, size
        self._open = functools.lru_cache(4)(functools.partial(np.load, mmap_mode="r"))

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index):
        if isinstance(index, slice):
            return np.stack([self[i] for i in range(*index.indices(self._num))])
        if not -self._num <= index < self._num:
            raise IndexError(index)
        batch, row = divmod(index % self._num, self._size)
        return np.array(self._open(self._paths[batch])[row])


def draw(
    cascade: Cascade,
    samplers: Sequence[SamplerConfig],
    examples: Sequence[Example],
    captions: Sequence[str],
    *,
    seed: int,
    true_low_res: bool,
    truncate: bool,
    record: Mapping[str, Any],
    folder: Path,
    name: str,
) -> Stored:
    """Samples one image for each example, except those that an earlier call has stored.

    Args:
      samplers: one per stage.
      captions: of the examples.
      seed: seed of the first sample; each further sample adds 1.
      true_low_res: start with the first super-resolution stage, from the examples' own images.
      truncate: truncate prompts that are too long, instead of refusing them.
      record: JSON-able; everything that the samples depend on.
      folder: the parent of the folder that keeps the samples.
      name: name in the progress bar.

    Raises:
      UserError: a prompt is too long.
    """
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    folder = folder / key
    stages = list(zip(cascade.stages, samplers, strict=True))
    if true_low_res:
        stages = [(stage, sampler) for stage, sampler in stages if stage.low_res]
    requests = [Request(c, (seed + i) % 2**32, c) for i, c in enumerate(captions)]
    job = Job(requests, list(samplers), {}, BATCH, truncate)
    side = stages[-1][0].size
    size = min(batch_size(stages[0][0].size, BATCH), len(requests))
    starts = range(0, len(requests), size)
    paths = [folder / f"{start:08d}.npy" for start in starts]
    counts = [min(size, len(requests) - start) for start in starts]
    missing = [i for i, p in enumerate(paths) if not _is_whole(p, (counts[i], side, side, 3))]
    stored = Stored(paths, len(requests), size)
    if len(missing) < len(paths):
        log.info("%s: %d of %d batches exist already", name, len(paths) - len(missing), len(paths))
    if not missing:
        return stored
    cascade.check_lengths(job)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "protocol.json", record)
    total = sum(counts[i] for i in missing) * len(stages)
    with tqdm(total=total, desc=name, unit="image") as bar:
        for i in missing:
            rows = [min(starts[i] + k, len(requests) - 1) for k in range(size)]
            low_res = [examples[r]["image"] for r in rows] if true_low_res else None
            some = [requests[r] for r in rows]
            images = _batch(cascade, stages, job, some, low_res, counts[i], bar)
            with replacing(paths[i]) as temporary, temporary.open("wb") as file:
                np.save(file, images[: counts[i]])
    return stored


def _batch(
    cascade: Cascade,
    stages: Sequence[tuple[TrainedStage, SamplerConfig]],
    job: Job,
    requests: list[Request],
    true: list[np.ndarray] | None,
    count: int,
    bar: tqdm,
) -> np.ndarray:
    """Samples one batch through the stages; `count` of its rows are not padding."""
    seeds = np.array([r.seed for r in requests], np.uint32)
    images = None if true is None else shrink_pixels(np.stack(true), stages[0][0].low_res)
    for stage, sampler in stages:
        cond = cascade.conditioning(stage, job, requests, images)
        images = stage.stage.sample(
            stage.params, seeds, cond, sampler, batch_size(stage.size, BATCH)
        )
        bar.update(count)
    return images


def _is_whole(path: Path, shape: tuple[int, ...]) -> bool:
    """Returns whether a file has the samples of a batch; False if it is cut off."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == np.uint8
