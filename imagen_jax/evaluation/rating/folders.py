"""Folders of pictures with captions, as `imagen_jax.sample` and others write them.

A folder has one of these files:

    samples.json                  what imagen_jax.sample writes
    metadata.jsonl, metadata.csv  file_name, and prompt, caption or text; optionally category
    prompts.txt, captions.txt     one prompt per line; the sorted pictures are divided evenly
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from imagen_jax.common.errors import UserError

TEXT = ("prompt", "prompts", "caption", "text")  # names of the column of prompts
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
OTHER = ("grid.png",)  # what imagen_jax.sample also writes


# What a list yields: (file name, prompt, category or "").
Rows = Iterator[tuple[str, str, str]]


class Folder(NamedTuple):
    """The pictures of one model, or the references.

    Attributes:
      flag: the flag that names it, such as --a=samples, for messages.
      path: the folder.
      pictures: prompt -> files, in the order in which they are listed.
      categories: prompt -> its categories, where the folder states any.
    """

    flag: str
    path: Path
    pictures: dict[str, list[Path]]
    categories: dict[str, list[str]]


def read(path: Path, flag: str) -> Folder:
    """Reads which pictures a folder has, and of which prompts.

    Raises:
      UserError: there is no list of prompts, or it is malformed or names a missing picture.
    """
    readers = {
        "samples.json": _samples,
        "metadata.jsonl": _json_lines,
        "metadata.csv": _csv,
        "prompts.txt": _lines,
        "captions.txt": _lines,
    }
    flag = f"--{flag}={path}"
    if not path.is_dir():
        raise UserError(f"{flag} is not a folder")
    listing = next((path / name for name in readers if (path / name).exists()), None)
    if listing is None:
        raise UserError(f"{flag} has no list of prompts; write {' or '.join(readers)}")
    pictures, categories = defaultdict(list), defaultdict(list)
    root = path.resolve()
    for name, prompt, category in readers[listing.name](listing, f"{flag}: {listing.name}"):
        file = path / name
        if not file.resolve().is_relative_to(root):
            raise UserError(f"{flag}: {listing.name} names {name!r}, outside of the folder")
        if not file.is_file():
            raise UserError(f"{flag}: {listing.name} names {name!r}; there is no such file")
        pictures[prompt].append(file)
        if category and category not in categories[prompt]:
            categories[prompt].append(category)
    if not pictures:
        raise UserError(f"{flag}: {listing.name} names no picture")
    return Folder(flag, path, dict(pictures), dict(categories))


def _samples(listing: Path, label: str) -> Rows:
    try:
        entries = json.loads(listing.read_bytes())
    except (OSError, ValueError) as e:
        raise UserError(f"{label} cannot be read ({e})") from e
    if not isinstance(entries, list):
        raise UserError(f"{label} holds a {type(entries).__name__}; it must be a list")
    seen = set()
    for i, entry in enumerate(entries):
        row = _row(entry, "file", f"{label}, entry {i + 1}")
        # A prompt that was given twice was also drawn twice, with the same seeds.
        sample = (row[1], entry.get("seed", row[0]))
        if sample not in seen:
            seen.add(sample)
            yield row


def _json_lines(listing: Path, label: str) -> Rows:
    for i, line in enumerate(_text(listing, label).splitlines()):
        if line.strip():
            try:
                entry = json.loads(line)
            except ValueError as e:
                raise UserError(f"{label}, line {i + 1} is not JSON ({e})") from e
            yield _row(entry, "file_name", f"{label}, line {i + 1}")


def _csv(listing: Path, label: str) -> Rows:
    for i, entry in enumerate(csv.DictReader(io.StringIO(_text(listing, label)))):
        yield _row(entry, "file_name", f"{label}, row {i + 1}")


def _lines(listing: Path, label: str) -> Rows:
    prompts = [line.strip() for line in _text(listing, label).splitlines() if line.strip()]
    files = sorted(
        f.name
        for f in listing.parent.iterdir()
        if f.suffix.lower() in SUFFIXES and f.name not in OTHER
    )
    if not prompts or not files or len(files) % len(prompts):
        raise UserError(
            f"{label} has {len(prompts)} prompts for {len(files)} pictures; "
            "each needs the same number of pictures"
        )
    each = len(files) // len(prompts)
    for i, file in enumerate(files):
        yield file, prompts[i // each], ""


def _row(entry: Any, file: str, label: str) -> tuple[str, str, str]:
    entry = entry if isinstance(entry, dict) else {}
    prompt = next((entry[name] for name in TEXT if entry.get(name)), None)
    if not all(isinstance(x, str) and x.strip() for x in (entry.get(file), prompt)):
        raise UserError(f"{label}: it needs {file} and {' or '.join(TEXT)}")
    return entry[file], prompt.strip(), str(entry.get("category") or "").strip()


def _text(path: Path, label: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{label} cannot be read ({e})") from e


def read_categories(path: Path) -> dict[str, list[str]]:
    """Reads prompt -> categories from a CSV or TSV file, such as DrawBench's or PartiPrompts'.

    The file has the columns Prompts (or Prompt) and Category, or two columns without a header.

    Raises:
      UserError: it cannot be read, or lacks the columns.
    """
    label = f"--categories={path}"
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    rows = list(csv.reader(io.StringIO(_text(path, label)), delimiter=delimiter))
    names = [name.strip().lower() for name in rows[0]] if rows else []
    prompt = next((names.index(name) for name in TEXT if name in names), None)
    if prompt is not None and "category" in names:
        columns, rows = (prompt, names.index("category")), rows[1:]
    elif len(names) == 2 and prompt is None:
        columns, rows = (0, 1), rows if any(names) else rows[1:]
    else:
        raise UserError(f"{label} has the columns {', '.join(names)}; allowed: Prompts, Category")
    found = defaultdict(list)
    for i, row in enumerate(rows):
        cells = [row[c].strip() if c < len(row) else "" for c in columns]
        if not all(cells):
            raise UserError(f"{label}: row {i + 1} lacks a prompt or a category")
        if cells[1] not in found[cells[0]]:
            found[cells[0]].append(cells[1])
    if not found:
        raise UserError(f"{label} holds no prompt")
    return dict(found)


def check_same_prompts(folders: Iterable[Folder]) -> None:
    """Raises UserError unless all folders have pictures of the same prompts."""
    first, *others = folders
    for other in others:
        missing = first.pictures.keys() - other.pictures.keys()
        extra = other.pictures.keys() - first.pictures.keys()
        if missing or extra:
            example = min(missing or extra)[:60]
            raise UserError(
                f"{other.flag} has other prompts than {first.flag}: {len(missing)} are missing "
                f"and {len(extra)} are extra, such as {example!r}"
            )
