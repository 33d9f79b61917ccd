"""The order of the examples: formulas of the seed and the position, without any array.

    position in the stream -> Interleave -> task, position in the task
    position in the task   -> Order      -> epoch, index of the record

All take and return int64 arrays [k]. Both are bijections, so in an epoch of a task each record
comes once. They do not depend on hosts or batches, so one number resumes a stream on any number of
hosts.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import tensorflow as tf

# Accelerators belong to JAX.
tf.config.set_visible_devices([], "GPU")

RUN = 16  # consecutive records that a windowed order reads at once, a power of two
CYCLE = 4096  # positions after which the tasks of a mixture repeat

# tf.random.experimental.index_shuffle prepends this constant to its seed. We call its raw op,
# because the function takes one seed for all rows and we need one per row.
_INDEX_SHUFFLE = 498247692


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of the records of a task.

    Full (`window=0`): each epoch is a random permutation of all records.

    Windowed: an epoch takes runs of RUN consecutive records in random order, `window` records at a
    time. Position p of a window belongs to its run p mod (window / RUN), so neighbors in the stream
    are from different, random runs, and two records of one run are at most a window apart. Each
    host's rows of a batch draw on few runs if the batch size and window / RUN are powers of two.
    What remains of the last run ends the epoch.

    Attributes:
      num: records of the task.
      seed: None for the stored order.
      window: 0, or a multiple of RUN.
    """

    num: int
    seed: int | None
    window: int = 0

    def index(self, position: np.ndarray) -> np.ndarray:
        """Returns the index of the record at each position."""
        epoch, place = np.divmod(position, self.num)
        if self.seed is None:
            return place
        if not self.window:
            return _permute(place, self.num, _INDEX_SHUFFLE, self.seed, epoch)
        runs, lanes = max(self.num // RUN, 1), self.window // RUN
        first = place // self.window * lanes  # the window's first run
        width = np.clip(runs - first, 1, lanes)  # the last window has fewer runs
        turn, lane = np.divmod(place - first * RUN, width)
        slot = np.minimum(first + lane, runs - 1)
        run = _permute(slot, runs, 1, self.seed, epoch)
        inside = turn % RUN ^ slot % RUN  # each run of a window is at another of its records
        return np.where(place < self.num // RUN * RUN, run * RUN + inside, place)

    def epoch(self, position: np.ndarray) -> np.ndarray:
        """Returns how often each position's record has come before."""
        return position // self.num


def _permute(x: np.ndarray, num: int, *key: int | np.ndarray) -> np.ndarray:
    """Maps x in [0, num) by a pseudo-random permutation; `key` is three integers, each may be [k].

    RandomIndexShuffle is a block cipher (Simon) on the smallest block that holds num, applied again
    until the result is below num.
    """
    seeds = np.stack([np.broadcast_to(np.int64(k), x.shape) for k in key], axis=1)
    last = tf.constant(num - 1, tf.int64)
    return tf.raw_ops.RandomIndexShuffle(index=x, seed=seeds, max_index=last, rounds=4).numpy()


@dataclasses.dataclass(frozen=True)
class Interleave:
    """The tasks of a mixture, spread evenly in proportion to their weights.

    Rates are rounded to multiples of 1 / CYCLE; every task gets at least one position in a cycle.
    """

    weights: Sequence[float]

    def locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the number of the task at each position, and the position in that task."""
        if len(self.weights) == 1:
            return np.zeros_like(position), position
        counts, tasks, before = self._pattern
        cycle, slot = np.divmod(position, CYCLE)
        return tasks[slot], cycle * counts[tasks[slot]] + before[slot]

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        share = np.array(self.weights, np.float64) / sum(self.weights)
        counts = np.maximum(np.floor(share * CYCLE), 1).astype(np.int64)
        missing = CYCLE - counts.sum()  # the tasks furthest below their share get what is missing
        for _ in range(abs(missing)):
            away = (share * CYCLE - counts) * np.sign(missing)
            counts[np.argmax(away if missing > 0 else np.where(counts > 1, away, -np.inf))] += (
                np.sign(missing)
            )
        tasks = np.repeat(np.arange(len(counts)), counts)
        before = np.concatenate([np.arange(n) for n in counts])
        slots = np.argsort((before + 0.5) / counts[tasks], kind="stable")
        return counts, tasks[slots], before[slots]
