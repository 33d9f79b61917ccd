"""Shared by records and embeddings: caption keys, and entries of the reports on skipped items."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

NO_BEAM = (
    "Apache Beam is not installed; install it with: pip install -c constraints-beam.txt "
    "-e '.[beam]'"
)


class Skip(NamedTuple):
    """A candidate that was skipped or changed: its name, a reason to count by, and the details."""

    name: str
    reason: str
    detail: str = ""


def summary(skipped: Sequence[Skip]) -> str:
    """Returns the reasons with their counts on one line, the most frequent first."""
    return listed(Counter(skip.reason for skip in skipped).most_common()) or "nothing"


def listed(counts: Iterable[tuple[str, int]]) -> str:
    """Returns reasons with their counts on one line, in the given order."""
    return ", ".join(f"{reason} {count}" for reason, count in counts)


def caption_key(caption: str) -> bytes:
    """Returns the 16-byte key of a caption. Among 2^40 captions, P(collision) is 2^-49."""
    return hashlib.sha256(caption.encode("utf-8", errors="surrogateescape")).digest()[:16]
