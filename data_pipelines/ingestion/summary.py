"""Counts of what happened to items: for the manifest, the report and the data card."""

from __future__ import annotations

import base64
import dataclasses
import heapq
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from data_pipelines.common import Skip
from data_pipelines.records import splits

LISTED = 1000  # entries for each reason that a part keeps
REPORTED = 10_000  # entries for each reason in the report
PICTURES = 2  # rejected images for each reason and part that the data card may show
_BINS = {
    "shorter side": (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048),
    "aspect ratio": (1, 1.1, 1.25, 1.5, 2, 3),
    "words in a caption": (1, 5, 10, 20, 40, 80),
}


def _counters() -> defaultdict[str, Counter]:
    return defaultdict(Counter)


@dataclasses.dataclass
class Summary:
    """What happened to the items of a part, or of all parts.

    Attributes:
      items: candidates: items, and things in the source that are none.
      counts: {"rejected" or "changed": {reason: number}}.
      entries: the same as lists of Skip, at most LISTED for each reason (REPORTED for all parts).
      histograms: of the accepted items: {what: {bin: number}}.
      pictures: {reason: [(rank, thumbnail in base64)]} of rejected images.
    """

    items: int = 0
    accepted: int = 0
    counts: defaultdict[str, Counter] = dataclasses.field(default_factory=_counters)
    entries: dict[str, list[Skip]] = dataclasses.field(
        default_factory=lambda: {"rejected": [], "changed": []}
    )
    histograms: defaultdict[str, Counter] = dataclasses.field(default_factory=_counters)
    pictures: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)

    def add(self, what: str, skip: Skip, most: int = LISTED) -> None:
        """Counts a rejection or a change, and lists the first `most` of each reason."""
        self.counts[what][skip.reason] += 1
        if self.counts[what][skip.reason] <= most:
            self.entries[what].append(skip)

    def count(self, what: str, value: Any) -> None:
        """Counts a value in a histogram."""
        if bins := _BINS.get(what):
            at = bisect_right(bins, value) - 1
            last = at + 1 == len(bins)
            value = f"{bins[at]} or more" if last else f"{bins[at]} to {bins[at + 1]}"
        self.histograms[what][str(value)] += 1

    def show(self, skip: Skip, thumbnail: bytes) -> None:
        """Keeps a rejected image if it is among the first by the hash of its name."""
        rank = splits.rank(0, skip.name).hex()[:16]
        several = [
            *self.pictures.get(skip.reason, []),
            (rank, base64.b64encode(thumbnail).decode()),
        ]
        self.pictures[skip.reason] = heapq.nsmallest(PICTURES, several)

    def to_json(self) -> dict[str, Any]:
        return vars(self)


def merge(parts: Iterable[dict[str, Any]], pictures: int = 8) -> Summary:
    """Adds up `to_json` of parts, in order."""
    total, listed = Summary(), Counter()
    for part in parts:
        total.items += part["items"]
        total.accepted += part["accepted"]
        for what, counter in part["counts"].items():
            total.counts[what].update(counter)
        for what, entries in part["entries"].items():
            for skip in (Skip(*entry) for entry in entries):
                listed[what, skip.reason] += 1
                if listed[what, skip.reason] <= REPORTED:
                    total.entries[what].append(skip)
        for what, counter in part["histograms"].items():
            total.histograms[what].update(counter)
        for reason, several in part["pictures"].items():
            shown = [*total.pictures.get(reason, []), *map(tuple, several)]
            total.pictures[reason] = heapq.nsmallest(pictures, shown)
    return total


def sort_key(what: str, name: str) -> tuple:
    """Orders the bins of a histogram by value; other values come by name."""
    starts = [f"{start} " for start in _BINS.get(what, ())]
    return next((i for i, start in enumerate(starts) if name.startswith(start)), -1), name
