"""Records by index: reads any range of a split in few large reads, in memory that does not grow.

A source has a length and `read(start, stop)`, which returns a Record for each index, or a Bad that
says what is wrong with it. There are two: RecordFiles of a prepared dataset, and Tars in place.
records.opening opens either. Memory per source: two integers per file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from ml_dtypes import bfloat16

from data_pipelines.records.files import Files
from imagen_jax.common.errors import first_line

_CHUNK = 256  # records read at a time when all are


class Record(NamedTuple):
    """A record as stored.

    Attributes:
      image: an encoded image, such as JPEG.
      captions: one or more.
      sources: for each caption, the name of the column or model that it comes from; () if the
        captions have no names.
      embedding: bfloat16 [tokens, dim] of the only caption as bytes; None if it is in a store.
    """

    id: str
    image: bytes
    captions: tuple[str, ...]
    category: str = ""
    scene: str = ""
    embedding: bytes | None = None
    tokens: int = 0
    sources: tuple[str, ...] = ()

    def embedded(self) -> np.ndarray:
        """Returns the embedding, bfloat16 [tokens, dim].

        Raises:
          Bad: the record has none, or a damaged one.
        """
        if self.embedding is None:
            raise Bad("no embedding in the record", "", self.id)
        try:
            return np.frombuffer(self.embedding, bfloat16).reshape(self.tokens, -1)
        except ValueError as e:
            raise Bad("damaged embedding", first_line(e), self.id) from e


class Bad(Exception):
    """Why a record cannot be used: a reason to count by, and the details."""

    def __init__(self, reason: str, detail: str = "", record_id: str = ""):
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail, self.record_id = reason, detail, record_id


class Source(Protocol):
    """Records by index."""

    files: Files

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> list[Record | Bad]:
        """Reads the records start, ..., stop - 1, with one read per file that they are in."""


def records(source: Source) -> Iterator[Record | Bad]:
    """Yields all records in order."""
    for start in range(0, len(source), _CHUNK):
        yield from source.read(start, min(start + _CHUNK, len(source)))


class Ranges:
    """Finds indices in a sequence of files with `lengths` records each."""

    def __init__(self, lengths: Sequence[int]):
        self.ends = np.cumsum(np.asarray(lengths, np.int64))

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def split(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Yields (file, first, last + 1) within each file that start, ..., stop - 1 are in."""
        while start < stop:
            file = int(np.searchsorted(self.ends, start, "right"))
            before = int(self.ends[file - 1]) if file else 0
            until = min(stop, int(self.ends[file]))
            yield file, start - before, until - before
            start = until
