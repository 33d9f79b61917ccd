"""Writes one file of a dataset, the offsets of its records, and a summary beside the parts.

The summary is written last, so a shard that has one is finished.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from data_pipelines.ingestion.layout import Piece, Shard
from data_pipelines.ingestion.stage import Progress
from data_pipelines.records import tfrecord
from data_pipelines.records.record_files import offsets_path
from imagen_jax.common.files import replacing, write_text


class Task(NamedTuple):
    """A shard to write.

    Attributes:
      name: of the dataset.
      folder: of the dataset.
      work: of the unfinished parts.
    """

    shard: Shard
    name: str
    folder: str
    work: str

    @property
    def path(self) -> epath.Path:
        return epath.Path(self.folder) / self.shard.file(self.name)

    def file(self, suffix: str) -> epath.Path:
        return epath.Path(self.work) / f"{self.shard.split}-{self.shard.number:05d}{suffix}"

    @property
    def done(self) -> bool:
        """Whether the shard exists with the same records."""
        if not (self.file(".json").exists() and self.path.exists()):
            return False
        there = self.summary()
        same = there["digest"] == self.shard.digest and there["file"] == self.path.name
        same &= "caption_sources" in there  # not written by earlier versions
        return same and there["bytes"] == self.path.stat().length

    def summary(self) -> dict[str, Any]:
        return json.loads(self.file(".json").read_text())

    @property
    def offsets_path(self) -> epath.Path:
        """The file with the byte at which each record starts and the last ends, int64 [n + 1]."""
        return epath.Path(offsets_path(str(self.path)))


def write(task: Task, progress: Progress) -> None:
    """Writes a shard from the files of its pieces, unless it exists."""
    if not task.done:
        write_records(task, read_pieces(task.shard.pieces), progress)


def read_pieces(pieces: Iterable[Piece]) -> Iterator[bytes]:
    """Yields the frames of records."""
    for path, starts in pieces:
        with epath.Path(path).open("rb") as file:
            for start in starts.tolist():
                file.seek(start)
                yield next(tfrecord.read_frames(file, path))


def write_records(task: Task, frames: Iterable[bytes], progress: Progress) -> None:
    """Writes a shard and its summary from frames of records."""
    digest, size, num_captions, most = hashlib.sha256(), 0, 0, 0
    starts, sources = [], Counter()
    task.file(".json").unlink(missing_ok=True)
    with replacing(task.path) as temporary, temporary.open("wb") as file:
        for framed in frames:
            file.write(framed)
            digest.update(framed)
            values = tfrecord.decode(tfrecord.data_of(framed))
            captions = values["captions"]
            sources.update(name.decode() for name in values.get("caption_sources", ()))
            starts.append(size)
            size += len(framed)
            num_captions, most = num_captions + len(captions), max(most, len(captions))
            progress(1, len(framed))
    with replacing(task.offsets_path) as temporary, temporary.open("wb") as file:
        np.save(file, np.array([*starts, size], np.int64))
    summary = {
        "file": task.path.name,
        "records": len(starts),
        "bytes": size,
        "sha256": digest.hexdigest(),
        "digest": task.shard.digest,
        "captions": num_captions,
        "most_captions": most,
        "caption_sources": dict(sorted(sources.items())),
    }
    write_text(task.file(".json"), json.dumps(summary))
