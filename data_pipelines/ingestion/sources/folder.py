"""A folder of images with captions: text files beside them, or lists such as Hugging Face's.

An image takes its captions from the first of these that has one:
  1. metadata.jsonl, metadata.csv or metadata.parquet (Hugging Face's image folder), metadata.json
  2. captions.jsonl, captions.csv or captions.json
  3. a text file of its name: photo.txt beside photo.jpg, one caption on each line
Lists may be in any subfolder; the paths in a list are relative to its folder. A photo.json beside
an image may have scores and a license, as img2dataset writes them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from etils import epath

from data_pipelines.common import Skip
from data_pipelines.ingestion import items
from data_pipelines.ingestion.items import Caption, Columns, Source
from data_pipelines.ingestion.sources.listed import Entry, parts_of, read_list
from imagen_jax.common.errors import UserError

LISTS = (
    *("metadata.jsonl", "metadata.csv", "metadata.parquet", "metadata.json"),
    *("captions.jsonl", "captions.csv", "captions.json"),
)


def find(paths: list[epath.Path], columns: Columns, part_size: int) -> Source:
    """Lists the captioned images below a folder, sorted by name.

    Raises:
      UserError: it is not a folder, or a list in it cannot be used.
    """
    root = paths[0]
    if not root.is_dir():
        raise UserError(f"--source={root} is not a folder")
    files, skipped = _walk(root)
    entries = _listed(root, files, columns, skipped)
    beside = {_stem(f): f for f in files if f.lower().endswith(".txt")}
    images = sorted(f for f in files if _is_image(f))
    for file in images:
        if file not in entries and _stem(file) in beside:
            try:
                entries[file] = _from_text(root, file, beside[_stem(file)], files, columns.outside)
            except OSError as e:
                skipped.append(Skip(items.printable(file), "unreadable file", str(e.strerror)))
    usable = []
    for file in images:
        entry = entries.get(file)
        if entry is None:
            skipped.append(Skip(items.printable(file), "missing caption"))
        elif not entry.captions:
            skipped.append(Skip(entry.id, "empty caption"))
        elif any(items.printable(c.text) != c.text for c in entry.captions):
            skipped.append(Skip(entry.id, "caption not UTF-8"))
        else:
            usable.append(entry)
    stems = {_stem(file) for file in images}
    for file in sorted(files - set(images)):
        if file.lower().endswith(".txt"):
            if _stem(file) not in stems:
                skipped.append(Skip(items.printable(file), "caption without an image"))
        elif Path(file).name not in LISTS and not _beside(file, ".json", stems):
            skipped.append(Skip(items.printable(file), "unsupported file type"))
    parts = parts_of("folder", usable, part_size, str(root), columns.outside)
    return Source("folder", str(root), parts, skipped)


def _walk(root: epath.Path) -> tuple[set[str], list[Skip]]:
    """Returns all files below `root` except hidden ones, and the folders it did not search."""
    files: set[str] = set()
    skipped: list[Skip] = []
    if "://" in str(root):
        return {p.relative_to(root).as_posix() for p in items.files_below(root)}, skipped

    def unreadable(error: OSError) -> None:
        skipped.append(Skip(items.printable(str(error.filename)), "unreadable folder", str(error)))

    for top, folders, names in os.walk(root, onerror=unreadable):
        here = Path(top).relative_to(root)
        for name in folders:
            if (Path(top) / name).is_symlink():
                skipped.append(Skip(items.printable(str(here / name)), "link to a folder"))
        files.update((here / name).as_posix() for name in names if not name.startswith("."))
    return files, skipped


def _listed(
    root: epath.Path, files: set[str], columns: Columns, skipped: list[Skip]
) -> dict[str, Entry]:
    """Returns the entries of all lists by file, the first list's for each."""
    entries: dict[str, Entry] = {}
    for name in LISTS:
        for path in sorted(f for f in files if Path(f).name == name):
            found, left_out = read_list(root / path, columns, path)
            skipped += left_out
            for listed, entry in found.items():
                file = Path(os.path.normpath(Path(path).parent / listed)).as_posix()
                if file not in files or not _is_image(file):
                    skipped.append(Skip(f"{path}: {entry.id}", "listed file missing"))
                elif file in entries:
                    skipped.append(Skip(f"{path}: {entry.id}", "duplicate entry"))
                else:
                    at = {"id": items.printable(file), "path": str(root / file)}
                    entries[file] = entry._replace(**at)
    return entries


def _from_text(
    root: epath.Path, file: str, text_file: str, files: set[str], outside: bool
) -> Entry:
    data = items.read_file(root / text_file, root, outside)
    text = data.decode("utf-8-sig", errors="surrogateescape")
    lines = dict.fromkeys(items.collapse(line) for line in text.splitlines())
    captions = tuple(Caption(line) for line in lines if line)
    row = {}
    if (beside := _stem(file) + ".json") in files:
        try:
            row = json.loads(items.read_file(root / beside, root, outside))
        except (ValueError, RecursionError):
            row = {}
    row = row if isinstance(row, dict) else {}
    scores, license = items.find_scores(row), items.find_license(row)
    return Entry(items.printable(file), str(root / file), captions, scores, license)


def _is_image(file: str) -> bool:
    return Path(file).suffix.lower() in items.IMAGE_SUFFIXES


def _beside(file: str, suffix: str, stems: set[str]) -> bool:
    return file.lower().endswith(suffix) and _stem(file) in stems


def _stem(file: str) -> str:
    return str(Path(file).with_suffix(""))
