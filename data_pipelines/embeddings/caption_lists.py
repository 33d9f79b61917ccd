"""Reads captions from text files (one per line), CSV, Parquet, or prepared records."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from data_pipelines.records import prepared
from data_pipelines.records.opening import open_split
from data_pipelines.records.source import records
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import matching

_LONGEST_FIELD = 2**24  # characters in a CSV field; a longer one means an unclosed quote


class Found(NamedTuple):
    """A caption and its location. Bytes that are not UTF-8 appear as lone surrogates."""

    source: str
    number: int
    caption: str


def expand(patterns: Sequence[str]) -> list[str]:
    """Returns the files that match paths with * and ?, sorted.

    Raises:
      UserError: a pattern matches nothing, or a file has an unsupported type.
    """
    files = matching(patterns, "captions")
    for file in files:
        if epath.Path(file).suffix not in _READERS:
            raise UserError(f"--captions has {file!r}; allowed: {', '.join(_READERS)}")
    return files


def read_file(file: str, column: str) -> Iterator[Found]:
    """Yields the captions of a file, with white space collapsed.

    Args:
      column: the column of the captions in CSV and Parquet.

    Raises:
      UserError: the file cannot be read, or has no such column of text.
    """
    path = epath.Path(file)
    try:
        with path.open("rb") as opened:
            for number, caption in _READERS[path.suffix](opened, file, column):
                yield Found(file, number, " ".join(caption.split()))
    except (OSError, csv.Error) as e:
        raise UserError(f"{file}: cannot be read: {e}") from e


def read_dataset(data_dir: str, name: str) -> Iterator[Found]:
    """Returns the captions of all splits of a prepared dataset such as "scenes/64", unchanged.

    Raises:
      UserError: there is no such dataset.
    """
    # Not a generator: it fails before the caller opens a bar.
    splits = sorted(prepared.dataset_info(data_dir, name).num_examples)
    sources = {split: open_split(data_dir, name, split) for split in splits}
    return (
        Found(f"{name}:{split}", number, caption)
        for split, source in sources.items()
        for number, record in enumerate(records(source))
        for caption in getattr(record, "captions", ())  # a bad record has none
    )


def read_records(paths: Sequence[epath.Path]) -> Iterator[Found]:
    """Yields all captions of the records in TFRecord files that ingest wrote."""
    from data_pipelines.records import tfrecord

    for path in paths:
        with path.open("rb") as file:
            for number, framed in enumerate(tfrecord.read_frames(file, str(path))):
                for caption in tfrecord.decode(tfrecord.data_of(framed))["captions"]:
                    yield Found(path.name, number, caption.decode())


def _read_lines(opened, file: str, column: str) -> Iterator[tuple[int, str]]:
    # Binary lines, because those of a text file also end at a lone \r.
    for number, line in enumerate(opened, 1):
        yield number, line.decode("utf-8-sig", errors="surrogateescape")


def _read_csv(opened, file: str, column: str) -> Iterator[tuple[int, str]]:
    csv.field_size_limit(_LONGEST_FIELD)
    with io.TextIOWrapper(opened, "utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.DictReader(text)
        _check_column(file, column, rows.fieldnames or [])
        for row in rows:
            yield rows.line_num, row[column] or ""


def _read_parquet(opened, file: str, column: str) -> Iterator[tuple[int, str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(opened)
        _check_column(file, column, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(columns=[column]):
            # As bytes, because one text that is not UTF-8 would fail the whole batch.
            for value in batch.column(0).cast(pa.large_binary()).to_pylist():
                yield number, (value or b"").decode("utf-8", errors="surrogateescape")
                number += 1
    except pa.ArrowException as e:
        raise UserError(
            f"{file}: column {column!r} cannot be read: {str(e).splitlines()[0]}"
        ) from e


def _check_column(file: str, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise UserError(f"{file} has no column --column={column}; it has: {', '.join(columns)}")


_READERS = {".txt": _read_lines, ".csv": _read_csv, ".parquet": _read_parquet}
