"""Parquet with one image a row: its bytes, a Hugging Face struct of bytes and path, or its path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from etils import epath

from data_pipelines.common import Skip
from data_pipelines.ingestion import items
from data_pipelines.ingestion.items import Columns, Item, Part, Source, common_folder
from data_pipelines.ingestion.sources.listed import IMAGE_COLUMNS
from imagen_jax.common.errors import UserError

_ROWS = 64  # rows in memory at a time
_BYTES_COLUMNS = ("image", "jpg", "png", "webp", "jpeg", "img", "image_bytes", "bytes", "content")
_URLS = ("url", "URL", "image_url")


def find(paths: list[epath.Path], columns: Columns, part_size: int) -> Source:
    """Lists Parquet files, or those below a folder, in parts of about `part_size` rows.

    Raises:
      UserError: a column is missing or of another type, or the files have different columns.
    """
    files = list(items.files_below(paths[0], ".parquet")) if paths[0].is_dir() else paths
    root = paths[0] if paths[0].is_dir() else common_folder(paths)
    parts, wanted, first = [], None, {}
    for file in files:
        table, names = _open(str(file))
        wanted = wanted or _choose(file, names, columns)
        if missing := [name for name in wanted if name not in names]:
            raise UserError(
                f"{file} has no column {missing[0]!r}, which {files[0]} has; the files of a source "
                f"need the same columns (it has: {', '.join(names)})"
            )
        kinds = _kinds(file, table.schema_arrow, wanted)
        first = first or kinds
        if differing := [name for name in wanted if kinds[name] != first[name]]:
            raise UserError(
                f"{file}: the column {differing[0]!r} has {kinds[differing[0]]}, but "
                f"{first[differing[0]]} in {files[0]}; the files of a source need the same columns"
            )
        stem = str(file.relative_to(root))[: -len(file.suffix)]
        rows, size = table.metadata.num_rows, file.stat().length
        for start in range(0, rows, part_size):
            stop = min(start + part_size, rows)
            read = partial(read_rows, str(file), stem, wanted, columns, start, stop)
            label = f"{file} rows {start} to {stop}"
            fingerprint = f"{stem} {size} {start} {stop} {wanted} {columns}"
            parts.append(Part(label, size * (stop - start) // rows, fingerprint, read))
    return Source("parquet", str(paths[0]), parts, [])


def read_rows(
    path: str, stem: str, wanted: Sequence[str], columns: Columns, start: int, stop: int
) -> Iterator[Item | Skip]:
    """Yields the items of rows `start` to `stop` of a file.

    Raises:
      UserError: the file is damaged.
    """
    import pyarrow as pa

    table, names = _open(path)
    first, groups = _row_groups(table.metadata, start, stop)
    keep = [n for n in names if n in wanted or n.lower() in items.SCORES]
    keep += [n for n in names if n in items.LICENSE_COLUMNS]
    number = first
    try:
        for batch in table.iter_batches(_ROWS, row_groups=groups, columns=keep):
            if number < stop and number + len(batch) > start:
                for i in range(max(start - number, 0), min(stop - number, len(batch))):
                    row = {name: batch.column(name)[i].as_py() for name in keep}
                    yield _item(f"{stem}/{number + i:07d}", row, wanted[0], columns, path)
            number += len(batch)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: damaged or cut short: {str(e).splitlines()[0]}") from e


def _open(path: str) -> tuple[Any, list[str]]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(epath.Path(path).open("rb"))
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"{path}: not a readable Parquet file: {str(e).splitlines()[0]}") from e
    return table, table.schema_arrow.names


def _choose(file: epath.Path, names: Sequence[str], columns: Columns) -> list[str]:
    """Returns the columns to read: the image, then the captions."""
    images = [columns.image] if columns.image else [*_BYTES_COLUMNS, *IMAGE_COLUMNS]
    captions = columns.captions or items.CAPTION_COLUMNS
    image = next((name for name in images if name in names), None)
    found = [name for name in captions if name in names]
    if image is None:
        urls = [name for name in _URLS if name in names]
        hint = f"; {urls[0]!r} has addresses: download them with img2dataset first" if urls else ""
        raise UserError(
            f"{file} has no column of images{hint}. Name it with --image_column; the file has: "
            f"{', '.join(names)}"
        )
    if not found or (columns.captions and len(found) < len(captions)):
        raise UserError(
            f"{file} has no column {' or '.join(sorted(set(captions) - set(found)))}. Name the "
            f"captions with --caption_columns; the file has: {', '.join(names)}"
        )
    return [image, *(found if columns.captions else found[:1])]


def _kinds(file: epath.Path, schema: Any, wanted: Sequence[str]) -> dict[str, str]:
    """Returns what each wanted column has: "bytes", "text", "lists" or "structs".

    Raises:
      UserError: the first column has no images, or another no captions.
    """
    from pyarrow import types

    tests = {
        "text": (types.is_string, types.is_large_string, types.is_string_view),
        "bytes": (types.is_binary, types.is_large_binary, types.is_binary_view),
        "lists": (types.is_list, types.is_large_list),
        "structs": (types.is_struct,),
    }
    found = {}
    for name in wanted:
        kind = schema.field(name).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        image = name == wanted[0]
        allowed = ("bytes", "text", "structs") if image else ("text", "lists")
        found[name] = next((k for k in allowed if any(test(kind) for test in tests[k])), "")
        if not found[name]:
            what, flag = ("images", "image_column") if image else ("captions", "caption_columns")
            raise UserError(
                f"{file}: the column {name!r} has {kind}, no {what}; allowed: "
                f"{', '.join(allowed)}. Name another with --{flag}"
            )
    return found


def _row_groups(metadata: Any, start: int, stop: int) -> tuple[int, list[int]]:
    """Returns the row groups with the rows `start` to `stop`, and the number of their first row."""
    first, row, groups = 0, 0, []
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if row < stop and row + rows > start:
            first = first if groups else row
            groups.append(group)
        row += rows
    return first, groups


def _item(name: str, row: dict, image_column: str, columns: Columns, path: str) -> Item | Skip:
    captions = items.find_captions(row, columns.captions)
    if not captions:
        return Skip(name, "missing caption" if captions is None else "empty caption")
    image = row[image_column]
    if isinstance(image, dict):  # Hugging Face's Image
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        try:
            root = epath.Path(columns.folder or epath.Path(path).parent)
            image = items.read_file(root / image, root, columns.outside)
        except items.OutsideError as e:
            return Skip(name, "outside of the folder", items.printable(str(e.strerror)))
        except (OSError, ValueError):
            return Skip(name, "missing image", items.printable(str(image)))
    if not image or not isinstance(image, bytes):
        return Skip(name, "missing image")
    return Item(name, image, captions, items.find_scores(row), items.find_license(row))
