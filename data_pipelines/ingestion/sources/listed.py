"""Images that a list names: CSV, TSV, JSONL, or JSON with a list. Shared by folders and COCO.

A row has the path of an image, relative to the list's folder, and its captions. Rows that name the
same image add up to several captions.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import PurePath
from typing import Any, NamedTuple

from etils import epath

from data_pipelines.common import Skip
from data_pipelines.ingestion import items
from data_pipelines.ingestion.items import Caption, Columns, Item, Part, Source
from imagen_jax.common.errors import UserError

IMAGE_COLUMNS = (
    *("file_name", "image_path", "path", "filepath", "filename", "file", "img_path"),
    *("image_file", "image", "img"),
)
_LONGEST_FIELD = 2**24  # characters in a CSV field; a longer one means an unclosed quote


class Entry(NamedTuple):
    """An image file and what a list says of it."""

    id: str
    path: str
    captions: tuple[Caption, ...]
    scores: Mapping[str, float] = {}
    license: str = ""


def find(paths: list[epath.Path], columns: Columns, part_size: int) -> Source:
    """Lists the images of one or more lists.

    Raises:
      UserError: a list has no column of images or captions, or cannot be read.
    """
    entries, skipped = [], []
    for path in paths:
        folder = epath.Path(columns.folder or path.parent)
        found, left_out = read_list(path, columns, path.name)
        skipped += left_out
        for name, entry in found.items():
            entries.append(entry._replace(path=str(folder / name)))
    root = columns.folder or str(items.common_folder(paths))
    parts = parts_of("list", entries, part_size, root, columns.outside)
    return Source("list", str(paths[0]), parts, skipped)


def read_list(
    path: epath.Path, columns: Columns, label: str
) -> tuple[dict[str, Entry], list[Skip]]:
    """Reads a list: the entry of each path in it, and the rows that are none.

    Raises:
      UserError: no row has an image and a caption under the expected names, or it cannot be read.
    """
    found: dict[str, Entry] = {}
    skipped, names = [], {}
    for line, row in _rows(path, label):
        where = f"{label}:{line}"
        names |= dict.fromkeys(row)
        captions = items.find_captions(row, columns.captions)
        wanted = [columns.image] if columns.image else IMAGE_COLUMNS
        name = next((row[c] for c in wanted if isinstance(row.get(c), str) and row[c]), None)
        if name is None or captions is None:
            skipped.append(Skip(where, "unreadable entry", items.printable(str(row))[:100]))
        elif not captions:
            skipped.append(Skip(where, "empty caption", items.printable(name)))
        elif any(items.printable(c.text) != c.text for c in captions):
            skipped.append(Skip(where, "caption not UTF-8", items.printable(name)))
        elif not items.is_path(name):
            skipped.append(Skip(where, "unreadable entry", items.printable(repr(name))[:100]))
        else:
            name = PurePath(os.path.normpath(name)).as_posix()
            before = found[name].captions if name in found else ()
            captions = tuple(dict.fromkeys((*before, *captions)))
            scores, license = items.find_scores(row), items.find_license(row)
            found[name] = Entry(items.printable(name), name, captions, scores, license)
    if skipped and not found and all(skip.reason == "unreadable entry" for skip in skipped):
        shown = items.collapse(items.printable(", ".join(map(str, names))))[:500]
        raise UserError(
            f"{path}: no row has an image and a caption. Name the columns with --image_column and "
            f"--caption_columns; it has: {shown or 'none'}"
        )
    return found, skipped


def parts_of(
    kind: str, entries: Sequence[Entry], part_size: int, root: str, outside: bool
) -> list[Part]:
    """Divides entries into parts; `items.read_file` explains `root` and `outside`."""
    parts = []
    for start in range(0, len(entries), part_size):
        some = entries[start : start + part_size]
        sizes = [_size(entry.path) for entry in some]
        digest = hashlib.sha256()
        for entry, size in zip(some, sizes, strict=True):
            digest.update(ascii((*entry, size)).encode())
        label = f"{kind} {some[0].id} to {some[-1].id}"
        read = partial(read_entries, some, root, outside)
        parts.append(Part(label, sum(sizes), digest.hexdigest(), read))
    return parts


def read_entries(entries: Iterable[Entry], root: str, outside: bool) -> Iterator[Item | Skip]:
    """Yields the items of listed images."""
    for entry in entries:
        try:
            image = items.read_file(entry.path, root, outside)
        except FileNotFoundError:
            yield Skip(entry.id, "listed file missing")
        except items.OutsideError as e:
            yield Skip(entry.id, "outside of the folder", str(e.strerror))
        except OSError as e:
            yield Skip(entry.id, "unreadable file", str(e.strerror))
        else:
            yield Item(entry.id, image, entry.captions, entry.scores, entry.license)


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size if "://" not in path else epath.Path(path).stat().length
    except OSError:
        return 0


def _rows(path: epath.Path, label: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line, row); a line that cannot be parsed gives a row with only "error"."""
    suffix = path.suffix.lower()
    if "://" not in str(path) and path.exists() and not path.is_file():
        raise UserError(f"{path}: not a regular file")
    if suffix == ".parquet":
        yield from enumerate(_parquet_rows(path), 1)
        return
    try:  # bytes that are not UTF-8 become lone surrogates
        text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from e
    if suffix in (".csv", ".tsv"):
        csv.field_size_limit(_LONGEST_FIELD)
        delimiter = "\t" if suffix == ".tsv" else ","
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        try:
            yield from ((rows.line_num, {k: v for k, v in row.items() if k}) for row in rows)
        except csv.Error as e:
            raise UserError(f"{path}: line {rows.line_num}: {e}") from e
        if not rows.fieldnames:
            raise UserError(f"{path}: empty; the first line of a {suffix} file names its columns")
    elif suffix == ".json":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{path}: not valid JSON ({e})") from e
        if not isinstance(values, list):
            raise UserError(
                f"{path}: holds a {type(values).__name__}; it must be a list of objects"
            )
        for number, value in enumerate(values, 1):
            yield number, value if isinstance(value, dict) else {"value": value}
    else:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as e:
                    value = {"error": str(e)}
                yield number, value if isinstance(value, dict) else {"value": value}


def _parquet_rows(path: epath.Path) -> list[dict[str, Any]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with path.open("rb") as file:
            return parquet.read_table(file).to_pylist()
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file: {str(e).splitlines()[0]}") from e
