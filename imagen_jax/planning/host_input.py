"""Times this host's input pipeline."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import numpy as np

SECONDS = 5.0


def describe_rate(batches: Iterator[dict[str, np.ndarray]], seconds: float = SECONDS) -> str:
    """Reads batches for `seconds` after the first one and describes the rate in one line."""
    batch = next(batches)
    size = len(next(iter(batch.values())))
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        batch = next(batches)
        count += size
    rate = count / (time.perf_counter() - start)
    padded = rate * sum(x.nbytes for x in batch.values()) / size
    cores = len(os.sched_getaffinity(0))
    each = f"{rate / cores:,.1f} images/s per core of {cores}"
    return f"{rate:,.1f} images/s, {padded / 1e6:,.1f} MB/s padded; {each}"
