"""What the training loop asks of its data. data_pipelines.reading has the implementation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]


class Reader(Protocol):
    """The data of a run, as this host's share of every batch.

    A host reads share `shard` of `num_shards` of every batch: image uint8 [b, H, W, 3], text
    bfloat16 [b, T, D] and text_mask bool [b, T].
    """

    def train_batches(self, position: int, shard: int = 0, num_shards: int = 1) -> Iterator[Batch]:
        """Endless training batches, starting after `position` examples of the global stream."""

    def eval_batches(self, shard: int = 0, num_shards: int = 1) -> list[Batch]:
        """The held-out batches, the same at every call."""

    def examples(self, split: str, num: int) -> list[dict[str, Any]]:
        """The first `num` records of a split: caption, image, text, text_mask."""
