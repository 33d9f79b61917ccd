"""Pairs the images in a folder with their captions, and reports why it skips the other files.

An image takes its caption from the first of these that has one:
  1. metadata.jsonl: {"file_name": ..., "text" or "caption": ...} on each line,
  2. captions.csv with the columns file_name and caption (or text),
  3. a text file with the image's name: photo.txt beside photo.jpg.
The two lists may be in any subfolder; file names in a list are relative to its folder. A run of
white space becomes one space.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from data_pipelines.records.dataset import Skip
from imagen_jax.common.errors import UserError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}
LISTS = ("metadata.jsonl", "captions.csv")
CAPTION_KEYS = ("text", "caption")


class Captioned(NamedTuple):
    """An image file, as a path relative to the folder, and its caption."""

    file: str
    caption: str


def check_folder(folder: str) -> None:
    """Raises a UserError unless `folder` exists."""
    if not Path(folder).is_dir():
        raise UserError(f"--images={folder} is not a folder")


def find(folder: str) -> tuple[list[Captioned], list[Skip]]:
    """Returns the captioned images below `folder`, sorted by name, and the skipped files.

    Raises:
      UserError: the folder does not exist, or a captions.csv lacks a column.
    """
    check_folder(folder)
    root = Path(folder)
    files, skipped = _walk(root)
    captions: dict[str, str] = {}
    for file, caption, where in _listed(root, files):
        if file is None:
            skipped.append(Skip(where, "unreadable entry", caption))
        elif file not in files or Path(file).suffix.lower() not in IMAGE_SUFFIXES:
            skipped.append(Skip(where, "listed file missing", file))
        elif file in captions:
            skipped.append(Skip(where, "duplicate entry", file))
        else:
            captions[file] = caption
    beside = {_stem(file): file for file in files if file.lower().endswith(".txt")}
    images = [file for file in files if Path(file).suffix.lower() in IMAGE_SUFFIXES]
    for file in images:
        if file not in captions and _stem(file) in beside:
            captions[file] = _read(root / beside[_stem(file)])

    found = []
    for file in images:
        caption = " ".join(captions.get(file, "").split())
        if file not in captions:
            skipped.append(Skip(_printable(file), "missing caption"))
        elif not caption:
            skipped.append(Skip(_printable(file), "empty caption"))
        elif _printable(caption) != caption:
            skipped.append(Skip(_printable(file), "caption not UTF-8", _printable(caption)))
        else:
            found.append(Captioned(file, caption))
    stems = {_stem(file) for file in images}
    for file in sorted(files - set(images)):
        if file.lower().endswith(".txt"):
            if _stem(file) not in stems:
                skipped.append(Skip(_printable(file), "caption without an image"))
        elif Path(file).name not in LISTS:
            skipped.append(Skip(_printable(file), "unsupported file type"))
    return sorted(found), skipped


def _walk(root: Path) -> tuple[set[str], list[Skip]]:
    """Returns all files below `root` except hidden ones, and the folders it did not search."""
    files: set[str] = set()
    skipped: list[Skip] = []

    def unreadable(error: OSError) -> None:
        skipped.append(Skip(_printable(str(error.filename)), "unreadable folder", str(error)))

    for top, folders, names in os.walk(root, onerror=unreadable):
        here = Path(top).relative_to(root)
        for name in folders:
            if (Path(top) / name).is_symlink():
                skipped.append(Skip(_printable(str(here / name)), "link to a folder"))
        files.update((here / name).as_posix() for name in names if not name.startswith("."))
    return files, skipped


def _listed(root: Path, files: set[str]) -> Iterator[tuple[str | None, str, str]]:
    """Yields (file, caption, location) of each entry in the lists; file is None if unreadable."""
    for name, read in zip(LISTS, (_read_jsonl, _read_csv), strict=True):
        for path in sorted(f for f in files if Path(f).name == name):
            for line, entry in read(_read(root / path), path):
                where = f"{path}:{line}"
                caption = next((entry[k] for k in CAPTION_KEYS if k in entry), None)
                named = entry.get("file_name")
                if isinstance(named, str) and isinstance(caption, str):
                    file = os.path.normpath(os.path.join(os.path.dirname(path), named))
                    yield Path(file).as_posix(), caption, where
                else:
                    yield None, _printable(str(entry))[:100], where


def _read_jsonl(text: str, path: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError as e:
                entry = {"error": str(e)}
            yield number, entry if isinstance(entry, dict) else {"value": entry}


def _read_csv(text: str, path: str) -> Iterator[tuple[int, dict]]:
    rows = csv.DictReader(io.StringIO(text, newline=""))
    columns = rows.fieldnames or []
    if "file_name" not in columns or not set(CAPTION_KEYS) & set(columns):
        raise UserError(
            f"{path}: its first line names the columns {', '.join(columns) or 'none'}; "
            "needed: file_name, and caption or text"
        )
    for row in rows:
        yield rows.line_num, row


def _read(path: Path) -> str:
    """Reads a text file; bytes that are not UTF-8 become lone surrogates."""
    return path.read_bytes().decode("utf-8-sig", errors="surrogateescape")


def _printable(text: str) -> str:
    return text.encode("utf-8", errors="replace").decode()


def _stem(file: str) -> str:
    return str(Path(file).with_suffix(""))
