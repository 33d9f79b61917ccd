"""A source over TFRecord files.

The byte offsets of the records of a file are memory-mapped from `<file>.offsets.npy` when a record
of it is first read.
"""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Callable, Sequence

import google_crc32c
import numpy as np
from etils import epath

from data_pipelines.records import tfrecord
from data_pipelines.records.files import Files
from data_pipelines.records.source import Bad, Ranges, Record
from imagen_jax.common.errors import first_line

_CHECKS = google_crc32c.implementation == "c"  # in Python, a checksum takes longer than the rest


class RecordFiles(Ranges):
    """A source over TFRecord files of tf.train.Example.

    Args:
      path_of: file number -> path.
      lengths: records of each file.
    """

    def __init__(self, path_of: Callable[[int], str], lengths: Sequence[int]):
        super().__init__(lengths)
        self.files, self._path_of = Files(), path_of
        self._offsets = functools.lru_cache(256)(self._load_offsets)

    def read(self, start: int, stop: int) -> list[Record | Bad]:
        found: list[Record | Bad] = []
        for file, first, until in self.split(start, stop):
            found += self._read_file(file, first, until)
        return found

    def _read_file(self, file: int, first: int, until: int) -> list[Record | Bad]:
        path = self._path_of(file)
        file_name = path.rpartition("/")[2]
        names = [f"{file_name}:{i}" for i in range(first, until)]
        try:
            offsets = self._offsets(file)[first : until + 1].tolist()
            if len(offsets) <= until - first:
                raise ValueError("the file has fewer records than its metadata say")
            if any(a >= b for a, b in itertools.pairwise(offsets)):
                raise ValueError(f"{offsets_path(path)} is damaged; delete it")
            data = self.files.read(path, offsets[0], offsets[-1] - offsets[0])
        except (OSError, ValueError) as e:
            return [Bad("unreadable file", first_line(e), name) for name in names]
        bounds = zip(names, offsets, offsets[1:], strict=False)
        return [_parse(name, data[a - offsets[0] : b - offsets[0]], b - a) for name, a, b in bounds]

    def _load_offsets(self, file: int) -> np.ndarray:
        path = self._path_of(file)
        try:
            offsets = self.files.array(offsets_path(path))
            if offsets.ndim != 1 or offsets.dtype.kind not in "iu" or offsets[:1].tolist() != [0]:
                raise ValueError(f"{offsets_path(path)} is damaged; delete it")
            return offsets
        except FileNotFoundError:  # written by an earlier version, or by other programs
            return find_records(path)
        except OSError:  # of a remote file system
            if epath.Path(offsets_path(path)).exists():
                raise
            return find_records(path)


def offsets_path(path: str) -> str:
    """Returns the file with the offsets of a TFRecord file."""
    return f"{path}.offsets.npy"


def find_records(path: str) -> np.ndarray:
    """Finds the records of a TFRecord file: int64 [n + 1], where each starts and the last ends.

    Ends at a damaged header: nothing says where the next record starts.
    """
    starts = [0]
    size = epath.Path(path).stat().length
    with epath.Path(path).open("rb") as file:
        while starts[-1] < size and tfrecord.is_header(header := file.read(tfrecord.HEADER)):
            starts.append(starts[-1] + tfrecord.length_of(header) + tfrecord.FRAME)
            file.seek(min(starts[-1], size))
    if starts[-1] > 2**62:  # no file is so long
        starts.pop()
    return np.array(starts, np.int64)


def write_offsets(path: str) -> None:
    """Writes the offsets of a TFRecord file beside it, which saves readers from scanning it."""
    buffer = io.BytesIO()
    np.save(buffer, find_records(path))
    epath.Path(offsets_path(path)).write_bytes(buffer.getvalue())


def unframe(framed: bytes, size: int) -> bytes:
    """Returns the data of a TFRecord of `size` bytes; checks its length and its checksum.

    Raises:
      Bad: it is damaged.
    """
    if len(framed) < size:
        raise Bad("truncated file", f"{len(framed)} of {size} bytes")
    framed = framed[:size]
    if size < tfrecord.FRAME or tfrecord.length_of(framed) != size - tfrecord.FRAME:
        raise Bad("damaged record", "wrong length")
    if _CHECKS and not tfrecord.is_intact(framed):
        raise Bad("damaged record", "wrong checksum")
    return tfrecord.data_of(framed)


def _parse(name: str, framed: bytes, size: int) -> Record | Bad:
    from google.protobuf.message import DecodeError

    try:
        fields = tfrecord.features_of(unframe(framed, size))
    except Bad as bad:
        return Bad(bad.reason, bad.detail, name)
    except DecodeError:
        return Bad("damaged record", "not a tf.train.Example", name)

    def values(key: str, kind: str = "bytes_list") -> Sequence:
        return getattr(fields[key], kind).value if key in fields else ()

    def texts(key: str) -> tuple[str, ...]:
        return tuple(value.decode(errors="surrogateescape") for value in values(key))

    def text(key: str) -> str:
        return next(iter(texts(key)), "")

    record_id = text("id") or name
    captions, sources = texts("captions") or texts("caption"), texts("caption_sources")
    if not values("image") or not captions:
        return Bad("missing image or caption", "", record_id)
    if sources and len(sources) != len(captions):
        detail = f"{len(sources)} caption_sources for {len(captions)} captions"
        return Bad("damaged record", detail, record_id)
    embedding, tokens = values("text_embeddings"), values("text_tokens", "int64_list")
    if embedding and not tokens:
        return Bad("damaged embedding", "text_embeddings without text_tokens", record_id)
    return Record(
        record_id,
        values("image")[0],
        captions,
        text("category"),
        text("scene"),
        *((embedding[0], tokens[0]) if embedding else (None, 0)),
        sources=sources,
    )
