"""Reads the tasks of a config and yields this host's batches as NumPy arrays.

The example at a global position is a pure function of the position and the seed, so the position in
the data is one number that does not depend on the number of hosts (see reading.order).

Threads read and decode; the work is done by Pillow, TensorFlow and the operating system, which run
outside Python's lock. tf.data could not skip a bad record without moving the following ones.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.reading import check
from data_pipelines.reading.bad import BadRecords
from data_pipelines.reading.examples import Clock, Example, Examples
from data_pipelines.reading.order import Interleave
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config
from imagen_jax.devices.memory import physical_memory
from imagen_jax.devices.topologies import GIB
from imagen_jax.diffusion.conditioning import pad_text

Batch = dict[str, np.ndarray]

_AHEAD = 3  # batches read ahead of the one that is used
_CHUNK = 8  # examples per call of a thread
_MEASURED = 256  # records decoded before the memory that all take is known


def build(config: Config) -> None:
    """Draws the scenes of `data.task` if `data.build` is set and they do not exist yet.

    Raises:
      UserError: the task has no scenes, or different ones exist.
    """
    if not config.data.build:
        return
    from data_pipelines.scenes import builder  # other runs do not need it

    data, text = config.data, config.text
    builder.prepare(
        data.task, data.dir, data.num_train, text.encoder, text.max_tokens, data.categories
    )


@dataclasses.dataclass(frozen=True)
class Reader:
    """The data of one run: training.reader.Reader over the tasks of a config.

    Attributes:
      clock: seconds by part of reading, over all threads.

    Raises:
      UserError: as check.check_dataset.
    """

    config: Config
    clock: Clock = dataclasses.field(default_factory=Clock, compare=False)

    def __post_init__(self):
        check.check_dataset(self.config)

    @functools.cached_property
    def _bad(self) -> BadRecords:
        return BadRecords(self.config.data.max_bad_share)

    @functools.cached_property
    def _interleave(self) -> Interleave:
        return Interleave(tuple(check.rates_of(self.config.data).values()))

    def train_batches(self, position: int, shard: int = 0, num_shards: int = 1) -> Iterator[Batch]:
        """Returns this host's share of the training batches, without end.

        Args:
          position: global examples already consumed.
          shard: this host. Its rows are the contiguous block `shard` of every global batch.

        Returns:
          An iterator of dicts of image uint8 [b, H, W, 3], text bfloat16 [b, T, D] and text_mask
          bool [b, T], with b = batch_size / num_shards.

        Raises:
          UserError: the data cannot be read; data.in_memory is set and they are too large.
        """
        tasks = self._open("train", shuffle=True)
        if self.config.data.in_memory:
            for examples in tasks:
                self._into_memory(examples)
        return self._batches(tasks, position, shard, num_shards)

    def eval_batches(self, shard: int = 0, num_shards: int = 1) -> list[Batch]:
        """Returns the first `config.eval_batches` batches of the evaluation split.

        A split with fewer examples starts again.
        """
        tasks = self._open(self.config.data.eval_split, shuffle=False)
        with contextlib.closing(self._batches(tasks, 0, shard, num_shards)) as batches:
            return [next(batches) for _ in range(self.config.eval_batches)]

    def examples(self, split: str, num: int, start: int = 0) -> list[dict[str, Any]]:
        """Returns the records `start` to `num` of a split, whose captions serve as prompts.

        Returns:
          Dicts of id, caption, category, scene (str), image uint8 [H, W, 3], text bfloat16 [T, D]
          and text_mask bool [T].
        """
        tasks = self._open(split, shuffle=False)
        num = min(num, sum(map(len, tasks)))
        positions = np.arange(start, num)
        out = []
        for example in self._load(tasks, positions):
            strings = {"id": example.record.id, "caption": example.caption}
            strings |= {key: getattr(example.record, key) for key in ("category", "scene")}
            text = {key: values[0] for key, values in self.pad([example]).items()}
            out.append({**strings, **text})
        return out

    def count(self, split: str) -> int:
        """Returns the number of records of a split, of the categories in data.categories."""
        return sum(map(len, self._open(split, shuffle=False)))

    def training_examples(self, position: int, num: int) -> list[Example]:
        """Returns the training examples at `num` positions, for people to look at."""
        return self._load(self._open("train", shuffle=True), position + np.arange(num))

    def take_bad_records(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Returns the bad records by reason, and a list of those since the last call."""
        return self._bad.take()

    def pad(self, examples: Sequence[Example]) -> Batch:
        """Makes a batch of examples."""
        with self.clock("padding"):
            images = np.stack([example.image for example in examples])
            texts = zip(*(example.texts for example in examples), strict=True)
            return {"image": images, **pad_text(self.config.text.parts, *texts)}

    def _load(self, tasks: Sequence[Examples], positions: np.ndarray) -> list[Example]:
        return [examples.example(*at) for examples, *at in self._plan(tasks, positions)]

    def _plan(self, tasks: Sequence[Examples], positions: np.ndarray) -> list[tuple]:
        """Returns for each global position its examples and the arguments of their `example`."""
        with self.clock("order"):
            numbers, places = self._interleave.locate(positions)
            plan: list[Any] = [None] * len(positions)
            for number in np.unique(numbers):
                examples, [rows] = tasks[number], np.nonzero(numbers == number)
                order, place = examples.order, places[rows]
                columns = (order.index(place), order.epoch(place), positions[rows])
                for row, *at in zip(rows, *(column.tolist() for column in columns), strict=True):
                    plan[row] = (examples, *at)
            return plan

    def _open(self, split: str, shuffle: bool) -> list[Examples]:
        return [
            Examples(self.config, task, split, shuffle, self._bad, self.clock)
            for task in check.rates_of(self.config.data)
        ]

    def _batches(
        self, tasks: Sequence[Examples], position: int, shard: int, num_shards: int
    ) -> Iterator[Batch]:
        total = self.config.batch_size
        size = total // num_shards
        for examples in tasks:  # a mixture spreads the runs of a task over all hosts
            examples.keep_runs(total, size if len(tasks) == 1 else total)
        cores = len(os.sched_getaffinity(0))
        # A batch is made by one thread of `makers` from chunks that `readers` read.
        with ThreadPoolExecutor(cores) as readers, ThreadPoolExecutor(_AHEAD) as makers:

            def make(start: int) -> Batch:
                plan = self._plan(tasks, np.arange(start, start + size))
                chunks = [plan[i : i + _CHUNK] for i in range(0, size, _CHUNK)]
                loaded = readers.map(lambda chunk: [e.example(*at) for e, *at in chunk], chunks)
                return self.pad([example for chunk in loaded for example in chunk])

            first = position + shard * size
            ahead = deque(makers.submit(make, first + i * total) for i in range(_AHEAD))
            try:
                while True:
                    batch = ahead.popleft().result()
                    first += total
                    ahead.append(makers.submit(make, first + (_AHEAD - 1) * total))
                    yield batch
            finally:
                makers.shutdown(cancel_futures=True)

    def _into_memory(self, examples: Examples) -> None:
        """Decodes a whole split.

        Raises:
          UserError: it would take more than a quarter of this machine's memory.
        """
        num, available, loaded = len(examples), physical_memory(), []
        hidden = not log.isEnabledFor(logging.INFO)
        bar = tqdm(total=num, desc="reading into memory", unit=" records", disable=hidden)
        with bar, ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            for start in range(0, num, _MEASURED):
                indices = range(start, min(start + _MEASURED, num))
                chunks = [indices[i : i + _CHUNK] for i in range(0, len(indices), _CHUNK)]
                for chunk in pool.map(lambda chunk: list(map(examples.load, chunk)), chunks):
                    loaded += chunk
                bar.update(len(loaded) - bar.n)
                needed = sum(map(_bytes, loaded[:_MEASURED])) / min(num, _MEASURED) * num
                if needed > available / 4 and not start:
                    raise UserError(
                        f"config.data.in_memory is True, but {num:,} records take "
                        f"{needed / GIB:.1f} GiB; allowed: a quarter of this machine's "
                        f"{available / GIB:.1f} GiB. Set --config.data.in_memory=false"
                    )
        examples.memory = loaded


def _bytes(loaded: Any) -> int:
    if isinstance(loaded, Exception):
        return 0
    record, image = loaded
    return image.nbytes + len(record.embedding or b"")
