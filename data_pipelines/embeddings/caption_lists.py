"""Captions in files that hold many: text with one a line, CSV, Parquet, or prepared records."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from etils import epath

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

_LONGEST_FIELD = 2**24  # characters in a CSV file; longer than this is a quote never closed


class Found(NamedTuple):
    """A caption and its place; what is not UTF-8 is in it as lone surrogates."""

    source: str
    number: int
    caption: str


def expand(patterns: Sequence[str]) -> list[str]:
    """The files that paths with * and ? stand for, sorted.

    Raises:
      UserError: there is none for one of them, or one has a type that is not read.
    """
    files = set()
    for pattern in patterns:
        path = epath.Path(pattern)
        matches = [path] if path.exists() else list(path.parent.glob(path.name))
        if not matches:
            raise UserError(f"--captions has {pattern!r}; no such file")
        files.update(str(match) for match in matches)
    for file in files:
        if epath.Path(file).suffix not in _READERS:
            raise UserError(f"--captions has {file!r}; allowed: {', '.join(_READERS)}")
    return sorted(files)


def read_file(file: str, column: str) -> Iterator[Found]:
    """The captions of a file, white space collapsed, as everywhere in this project.

    Args:
      column: where they are in CSV and Parquet.

    Raises:
      UserError: it cannot be read, or there is no such column of text.
    """
    path = epath.Path(file)
    try:
        with path.open("rb") as opened:
            for number, caption in _READERS[path.suffix](opened, file, column):
                yield Found(file, number, " ".join(caption.split()))
    except (OSError, csv.Error) as e:
        raise UserError(f"{file}: cannot be read: {e}") from e


def read_dataset(data_dir: str, name: str) -> Iterator[Found]:
    """The captions of all splits of a prepared dataset such as "scenes/64", as they are in it.

    Raises:
      UserError: it is not there.
    """
    with cli.quiet_imports():
        from data_pipelines.records import dataset  # imports tfds

    info = dataset.open_dataset(data_dir, name).info
    for split in sorted(info.splits):
        for number, caption in enumerate(dataset.strings(info, split, "caption")):
            yield Found(f"{name}:{split}", number, caption)


def _read_lines(opened, file: str, column: str) -> Iterator[tuple[int, str]]:
    # Not the lines of a text file, which end at a lone \r too.
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
            # As bytes, because one text that is not UTF-8 would spoil the batch.
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
