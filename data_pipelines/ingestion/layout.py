"""Decides from the summaries of all parts which records are kept, and which file each goes to.

The result depends on the order of the parts and on nothing else, so any number of workers writes
the same files. It takes about 100 bytes of memory a record.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data_pipelines.common import Skip
from data_pipelines.ingestion.options import Options
from data_pipelines.ingestion.stage import Task
from data_pipelines.ingestion.summary import LISTED
from data_pipelines.records import splits
from imagen_jax.common.errors import UserError

EXAMPLES = 16


class Piece(NamedTuple):
    """Records of one file that go to one shard: where each starts, int64 [n], in bytes."""

    path: str
    starts: np.ndarray


class Shard(NamedTuple):
    """A file of the dataset and the records that it gets."""

    split: str
    number: int
    total: int
    pieces: list[Piece]

    @property
    def digest(self) -> str:
        """Hash of what goes in, to tell whether an existing file has the same records."""
        digest = hashlib.sha256()
        for path, starts in self.pieces:
            digest.update(path.rpartition("/")[2].encode() + starts.tobytes())
        return digest.hexdigest()

    def file(self, name: str) -> str:
        """Returns the file's name as tfds expects it."""
        return f"{name}-{self.split}.tfrecord-{self.number:05d}-of-{self.total:05d}"


class Layout(NamedTuple):
    """All shards, and what was dropped.

    Attributes:
      dropped: number of records by reason.
      entries: a Skip for each, at most LISTED.
      examples: pieces with records to show: of the kept ones, and by reason of dropped ones.
    """

    shards: list[Shard]
    dropped: Counter[str]
    entries: list[Skip]
    examples: dict[str, list[Piece]]


def plan(tasks: Sequence[Task], options: Options) -> Layout:
    """Drops duplicates, draws the validation split and fills shards.

    Raises:
      UserError: two records have the same id.
    """
    arrays = _Arrays(tasks)
    dropped: dict[str, dict[int, int]] = {}  # reason -> {record: the one that it repeats}
    keep = np.ones(arrays.size, bool)
    if options.duplicates != "none":
        dropped["duplicate image"] = repeats = _equal(arrays.content)
        keep[list(repeats)] = False
    if options.duplicates == "near":
        kept = np.flatnonzero(keep)
        near = _near(arrays.look[kept], options.near_distance)
        repeats = {int(kept[j]): int(kept[i]) for j, i in near.items()}
        dropped[f"near duplicate within --near_distance={options.near_distance}"] = repeats
        keep[list(repeats)] = False
    kept = np.flatnonzero(keep)
    _check_ids(arrays, kept)
    held_out = _held_out(arrays.rank[kept], options.validation_fraction)
    shards = []
    for split, records in (("train", kept[~held_out]), ("validation", kept[held_out])):
        total = -(-len(records) // options.shard_size)
        for number in range(total):
            some = records[number * options.shard_size : (number + 1) * options.shard_size]
            shards.append(Shard(split, number, total, arrays.pieces(some)))
    first = kept[np.argsort(arrays.rank[kept], kind="stable")[:EXAMPLES]]
    examples = {"": arrays.pieces(np.sort(first))}
    entries = []
    for reason, repeats in dropped.items():
        some = list(repeats)[:LISTED]
        names = arrays.ids([*some, *(repeats[record] for record in some)])
        entries += [Skip(names[r], reason, f"repeats {names[repeats[r]]}") for r in some]
        examples[reason] = arrays.pieces(np.array(some[:8], np.int64))
    counts = Counter({reason: len(repeats) for reason, repeats in dropped.items() if repeats})
    return Layout(shards, counts, entries, {k: v for k, v in examples.items() if v})


class _Arrays:
    """What is known of every record, in the order of the parts."""

    def __init__(self, tasks: Sequence[Task]):
        self._tasks = tasks
        columns: dict[str, list[np.ndarray]] = {}
        for task in tasks:
            with task.file(".npz").open("rb") as file, np.load(file) as loaded:
                for key in loaded:
                    columns.setdefault(key, []).append(loaded[key])
        self.content, self.look, self.rank, self._start = (
            np.concatenate(columns[key]) for key in ("content", "look", "rank", "start")
        )
        self._ends = np.cumsum([len(part) for part in columns["start"]])
        self.size = len(self._start)

    def pieces(self, records: np.ndarray) -> list[Piece]:
        """Returns where the records, sorted, are stored."""
        parts = np.searchsorted(self._ends, records, "right")
        return [
            Piece(str(self._tasks[part].file(".tfrecord")), self._start[records[parts == part]])
            for part in np.unique(parts)
        ]

    def ids(self, records: Sequence[int]) -> dict[int, str]:
        """Returns the ids of a few records."""
        found = {}
        parts = np.searchsorted(self._ends, records, "right") if records else np.array([])
        for part in np.unique(parts):
            ids = self._tasks[part].summary()["ids"]
            first = self._ends[part] - len(ids)
            found |= {r: ids[r - first] for r in records if first <= r < self._ends[part]}
        return found


def _equal(content: np.ndarray) -> dict[int, int]:
    """Returns each record with the content of an earlier one, and the first such."""
    _, first, inverse = np.unique(content, return_index=True, return_inverse=True)
    firsts = first[inverse]
    return {int(j): int(firsts[j]) for j in np.flatnonzero(firsts != np.arange(len(content)))}


def _near(look: np.ndarray, distance: int) -> dict[int, int]:
    """Returns each record that looks like an earlier one that is kept, and that one.

    Hashes within a distance of d agree in one of d + 1 bands of bits at least, so only records that
    agree in a band are compared. The result is exact.
    """
    hashes, first, inverse = np.unique(look, return_index=True, return_inverse=True)
    pairs = set()
    edges = np.linspace(0, 64, distance + 2).astype(np.uint64)
    for low, high in itertools.pairwise(edges):
        band = (hashes >> low) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        left, step = np.arange(len(order)), 1
        while len(left := left[left + step < len(order)]):
            left = left[band[order[left]] == band[order[left + step]]]
            a, b = order[left], order[left + step]
            close = np.bitwise_count(hashes[a] ^ hashes[b]) <= distance
            pairs |= {
                (max(i, j), min(i, j))
                for i, j in zip(first[a[close]].tolist(), first[b[close]].tolist(), strict=True)
            }
            step += 1
    firsts = first[inverse]
    repeats = {int(j): int(firsts[j]) for j in np.flatnonzero(firsts != np.arange(len(look)))}
    for later, earlier in sorted(pairs):
        if earlier not in repeats:
            repeats.setdefault(later, earlier)
    return repeats


def _check_ids(arrays: _Arrays, kept: np.ndarray) -> None:
    """Raises a UserError if two kept records have the same id. Their ranks are hashes of ids."""
    _, first, counts = np.unique(arrays.rank[kept], return_index=True, return_counts=True)
    if repeated := np.flatnonzero(counts > 1).tolist():
        one = int(kept[first[repeated[0]]])
        raise UserError(
            f"{len(repeated)} ids occur twice in the sources, for example "
            f"{arrays.ids([one])[one]!r}; ids must be unique"
        )


def _held_out(rank: np.ndarray, fraction: float) -> np.ndarray:
    """Returns which records are held out, bool [n]: at most half of them."""
    wanted = splits.wanted(len(rank), fraction)
    num = min(wanted, len(rank) // 2)
    if num < min(wanted, splits.GRID):
        print(splits.too_few(num, len(rank)), file=sys.stderr)
    mask = np.zeros(len(rank), bool)
    mask[np.argsort(rank, kind="stable")[:num]] = True
    return mask
