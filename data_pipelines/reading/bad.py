"""Counts and lists bad records, and stops a run that has too many."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any

from data_pipelines.records.source import Bad
from imagen_jax.common.errors import UserError

# Bad records that any run may have, so that the first batches do not stop it.
_ALLOWANCE = 8
_LISTED = 1000  # entries kept until the next `take`


class BadRecords:
    """The bad records that this process has met; threads may share it.

    Args:
      max_share: config.data.max_bad_share.
    """

    def __init__(self, max_share: float):
        self._max_share, self._lock = max_share, threading.Lock()
        self._read, self.counts, self._entries = 0, Counter(), []

    def good(self, num: int = 1) -> None:
        """Counts records without fault."""
        with self._lock:
            self._read += num

    def add(self, task: str, index: int, bad: Bad) -> None:
        """Counts and lists a bad record.

        Raises:
          UserError: there are too many.
        """
        with self._lock:
            self._read += 1
            self.counts[bad.reason] += 1
            if len(self._entries) < _LISTED:
                entry = {"task": task, "index": index, "id": bad.record_id}
                self._entries.append({**entry, "reason": bad.reason, "detail": bad.detail})
            if self.counts.total() > _ALLOWANCE + self._max_share * self._read:
                reasons = ", ".join(f"{r} {n:,}" for r, n in self.counts.most_common())
                raise UserError(
                    f"config.data.max_bad_share is {self._max_share:g}, but of {self._read:,} "
                    f"records of data.task={task} these are bad: {reasons}; the last is "
                    f"{bad.record_id or index}: {bad}"
                )

    def take(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Returns the counts by reason since the start, and the entries since the last call."""
        with self._lock:
            entries, self._entries = self._entries, []
            return dict(self.counts), entries
