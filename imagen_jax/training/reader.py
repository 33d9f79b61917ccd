"""The interface of the data that the loop reads; data_pipelines.reading implements it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class Reader(Protocol):
    """The data of a run.

    A batch is this host's part of the global batch, shard `shard` of `num_shards`: image uint8
    [b, H, W, 3], text bfloat16 [b, T, D] and text_mask bool [b, T].
    """

    def train_batches(self, position: int, shard: int = 0, num_shards: int = 1) -> Iterator[Batch]:
        """Yields training batches endlessly, starting after `position` examples of all shards."""

    def eval_batches(self, shard: int = 0, num_shards: int = 1) -> list[Batch]:
        """Returns the held-out batches, the same in every call."""

    def examples(self, split: str, num: int) -> list[dict[str, Any]]:
        """Returns the first `num` records of a split: id, caption, image, text, text_mask."""

    def take_bad_records(self) -> tuple[dict[str, int], list[dict[str, Any]]]:
        """Returns how many records were bad, by reason, and a list of those since the last call."""
