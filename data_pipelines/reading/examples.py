"""The examples of one task: records read in order, decoded, cropped, joined with embeddings."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.embeddings.lookup import Lookup
from data_pipelines.reading import check, images
from data_pipelines.reading.bad import BadRecords
from data_pipelines.reading.order import RUN, Order
from data_pipelines.records import prepared
from data_pipelines.records.opening import open_split
from data_pipelines.records.source import Bad, Record, records
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config

_TRIES = 1000  # records tried in place of a bad one
_CROP, _SUBSTITUTE = 0, 2**32  # streams of random numbers


class Example(NamedTuple):
    """An example as the model gets it, but not padded.

    Attributes:
      image: uint8 [S, S, 3].
      texts: for each text encoder, bfloat16 [tokens, dim].
    """

    image: np.ndarray
    texts: list[np.ndarray]
    caption: str
    record: Record
    task: str
    index: int


class Clock:
    """Seconds that threads have spent on each part of reading."""

    def __init__(self):
        self.seconds, self._lock = Counter(), threading.Lock()

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.seconds[part] += time.perf_counter() - start


def draw(seed: int, position: int, stream: int) -> np.random.Philox:
    """Returns a source of random numbers for an example, the same in every run with the seed."""
    return np.random.Philox(
        key=np.array([seed, position], np.int64).view(np.uint64), counter=stream
    )


class Examples:
    """The examples of a split of a task.

    Args:
      shuffle: False is the stored order, centered crops, and the first caption of each record that
        data.caption_weights allows.

    Raises:
      UserError: the split does not exist; a store of embeddings is missing; the dataset lacks a
        category.
    """

    def __init__(
        self, config: Config, task: str, split: str, shuffle: bool, bad: BadRecords, clock: Clock
    ):
        data = config.data
        name = check.dataset_of(task)
        check.check_split(task, prepared.dataset_info(data.dir, name).num_examples, split)
        self.config, self.task, self.shuffle = config, task, shuffle
        self._bad, self._clock = bad, clock
        self.source = open_split(data.dir, name, split)
        self._kept = self._of_categories(f"{name}:{split}") if data.categories else None
        num = len(self.source) if self._kept is None else len(self._kept)
        self.order = Order(num, config.seed if shuffle else None, data.shuffle_window)
        self.lookups = [
            Lookup(store) for store in config.stores or prepared.own_store(data.dir, name)
        ]
        self.keep_runs(1, 1)
        # The images of all records, if they are in memory: decoded, uint8 [S, S, 3], or Bad.
        self.memory: list[tuple[Record, np.ndarray] | Bad] | None = None

    def __len__(self) -> int:
        return self.order.num

    def keep_runs(self, total: int, size: int) -> None:
        """Makes room for the runs that a host reads at once, for its `size` of `total` rows."""
        lanes = max(1, self.order.window // RUN)
        batches = -(-lanes // math.gcd(lanes, total)) if total > size else 1
        own = lanes if total == size else min(lanes, batches * size)
        # A quarter more, because the batches read ahead overlap two windows.
        self._read_run = functools.lru_cache(own + own // 4 + 1)(self._uncached_run)

    def example(self, index: int, epoch: int, position: int) -> Example:
        """Returns the example of a record; of another one, fixed by `position`, if it is bad.

        Args:
          position: the global position, which all random choices depend on.

        Raises:
          UserError: there are too many bad records.
        """
        for tried in range(_TRIES):
            try:
                example = self._example(index, epoch, position)
                self._bad.good()
                return example
            except Bad as bad:
                self._bad.add(self.task, index, bad)
            raw = draw(self.config.seed, position, _SUBSTITUTE + tried).random_raw()
            index = int(raw % len(self))
        raise UserError(f"data.task={self.task}: {_TRIES} records in a row are bad")

    def load(self, index: int) -> tuple[Record, np.ndarray] | Bad:
        """Reads and decodes a record without random crops: the record, and uint8 [S, S, 3]."""
        try:
            record = self._record(index)
            with _naming(record), self._clock("decoding"):
                image = images.decode(record.image, self.config.full_size)
            return record._replace(image=b""), image
        except Bad as bad:
            return bad

    def _example(self, index: int, epoch: int, position: int) -> Example:
        record, image = self._loaded(index)
        with _naming(record):
            with self._clock("embeddings"):
                caption, texts = self._texts(record, epoch)
            with self._clock("decoding"):
                image = self._image(record, image, position)
        return Example(image, texts, caption, record, self.task, index)

    def _texts(self, record: Record, epoch: int) -> tuple[str, list[np.ndarray]]:
        """Returns a caption of the record, and its embedding by each encoder."""
        weights = self.config.data.caption_weights if record.sources else {}
        key = (self.config.seed, epoch, record.id) if self.shuffle else None
        number = choose_caption(record.sources or ("",) * len(record.captions), weights, key)
        caption = record.captions[number]
        if number and not self.lookups:
            raise Bad("no embedding in the record", "of a caption other than the first")
        texts = [lookup(caption) for lookup in self.lookups] or [record.embedded()]
        for part, text in zip(self.config.text.parts, texts, strict=True):
            if text.shape[1] != part.dim or not 0 < len(text) <= part.max_tokens:
                raise Bad("embedding of another shape", f"{text.shape}")
        return caption, texts

    def _image(self, record: Record, image: np.ndarray | None, position: int) -> np.ndarray:
        """Decodes the record unless `image` is given; applies the random crops and flips."""
        config, data = self.config, self.config.data
        random = self.shuffle and (data.crop == "random" or data.flip or data.image_size)
        raw = draw(config.seed, position, _CROP).random_raw(6) if random else None
        if image is None:
            scale, place = 1.0, None
            if random and data.crop == "random":
                below, *place = (raw[:3] / 2**64).tolist()
                scale = 1 - below * (1 - data.min_crop_scale)
            image = images.decode(record.image, config.full_size, scale, place)
        image = crop(config, image, raw[3:5] if random else None)
        return image[:, ::-1] if random and data.flip and raw[5] % 2 else image

    def _loaded(self, index: int) -> tuple[Record, np.ndarray | None]:
        if self.memory is None:
            return self._record(index), None
        if isinstance(found := self.memory[index], Bad):
            raise found
        return found

    def _record(self, index: int) -> Record:
        if self._kept is not None:
            index = int(self._kept[index])
        with self._clock("reading"):
            if self.order.window:
                record = self._read_run(index // RUN)[index % RUN]
            else:
                [record] = self.source.read(index, index + 1)
        if isinstance(record, Bad):
            raise record
        return record

    def _uncached_run(self, run: int) -> list[Record | Bad]:
        return self.source.read(run * RUN, min((run + 1) * RUN, len(self.source)))

    def _of_categories(self, name: str) -> np.ndarray:
        """Returns the indices of the records of the wanted categories."""
        wanted = self.config.data.categories
        found = np.array([getattr(record, "category", "") for record in records(self.source)])
        if not any(found):
            raise check.no_categories(name.partition(":")[0])
        if unknown := set(wanted) - set(found.tolist()):
            raise UserError(
                f"config.data.categories has {min(unknown)!r}; {name} has: "
                f"{', '.join(sorted(set(found.tolist()) - {''}))}"
            )
        return np.flatnonzero(np.isin(found, wanted))


def crop(config: Config, image: np.ndarray, random: np.ndarray | None) -> np.ndarray:
    """Crops a square of model.image_size, centered or at a random corner.

    The corner is a multiple of the upscaling factor, so shrinking the crop gives exactly the crop
    of the shrunk image. Super-resolution thus trains on the kind of input it gets in sampling.

    Args:
      random: two random uint64, or None for a centered crop.
    """
    size, step = config.unet.image_size, config.upscale
    places = (config.full_size - size) // step + 1
    corner = [places // 2] * 2 if random is None else (random % np.uint64(places)).tolist()
    top, left = (int(c) * step for c in corner)
    return image[top : top + size, left : left + size]


@contextlib.contextmanager
def _naming(record: Record) -> Iterator[None]:
    """Adds the record's id to a Bad."""
    try:
        yield
    except Bad as bad:
        raise Bad(bad.reason, bad.detail, bad.record_id or record.id) from bad


def choose_caption(
    sources: Sequence[str], weights: Mapping[str, float], key: tuple[int, int, str] | None
) -> int:
    """Returns the number of a caption of a record.

    Draws a source by its weight among those that the record has, then one of the source's captions,
    each as likely as the others.

    Args:
      sources: of each caption.
      weights: by source, data.caption_weights; {} draws from all captions alike.
      key: the seed, the epoch and the record's id; None takes the first caption that has a weight.

    Raises:
      Bad: no caption has a weight.
    """
    allowed = [i for i, source in enumerate(sources) if not weights or source in weights]
    if not allowed:
        raise Bad("no caption of data.caption_weights", f"only of {', '.join(sources)}")
    if key is None or len(allowed) == 1:
        return allowed[0]
    digest = hashlib.sha256(repr(key).encode()).digest()
    number, place = (int.from_bytes(digest[i : i + 8], "little") for i in (0, 8))
    if weights:
        present = [name for name in weights if name in sources]
        ends = np.cumsum([weights[name] for name in present])
        drawn = present[int(np.searchsorted(ends, place / 2**64 * ends[-1], "right"))]
        allowed = [i for i in allowed if sources[i] == drawn]
    return allowed[number % len(allowed)]
