"""What cannot be used, and why: listed in full, and summed up in one line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple


class Skip(NamedTuple):
    """A candidate that becomes no record: its name, a reason to count by, and what was wrong."""

    name: str
    reason: str
    detail: str = ""


def summary(skipped: Sequence[Skip]) -> str:
    """The reasons for what was skipped, with their counts, the most frequent first."""
    counts = Counter(skip.reason for skip in skipped)
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common()) or "nothing"
