"""What sources yield, and the text of captions."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from data_pipelines.common import Skip

# Names of the scores, and of the columns that have them in any case (img2dataset, LAION).
SCORES = ("similarity", "pwatermark", "punsafe")
# The reason of a Skip for a key that occurs twice in a tar, which is an error unless damage is
# tolerated.
DUPLICATE_KEY = "duplicate key"
# Columns that hold captions, the first of them that a row has.
CAPTION_COLUMNS = ("caption", "captions", "text", "TEXT", "sentences", "description", "prompt")
LICENSE_COLUMNS = ("license", "LICENSE", "licence")
IMAGE_SUFFIXES = frozenset(
    [".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".heic", ".heif"]
)


class Caption(NamedTuple):
    """A caption and the name of the column or model that it comes from; "" if there is one."""

    text: str
    source: str = ""


class Item(NamedTuple):
    """An image as it was found.

    Attributes:
      id: unique in the dataset.
      image: the bytes of the file.
      captions: at least one, none of them empty.
      scores: of SCORES, those that the source has.
    """

    id: str
    image: bytes
    captions: tuple[Caption, ...]
    scores: Mapping[str, float] = {}
    license: str = ""


class Part(NamedTuple):
    """A piece of a source that one worker reads.

    Attributes:
      label: names it in messages.
      bytes: size of what is read, for progress.
      fingerprint: changes if its files or captions change.
      read: yields its items, and a Skip for each thing that is none. It can be pickled.
    """

    label: str
    bytes: int
    fingerprint: str
    read: Callable[[], Iterator[Item | Skip]]


class Source(NamedTuple):
    """A source, listed.

    Attributes:
      skipped: files that were left out when the source was listed.
    """

    kind: str
    path: str
    parts: list[Part]
    skipped: list[Skip]


class Columns(NamedTuple):
    """The columns that the user names; empty ones are found.

    Attributes:
      captions: columns of captions. If there are several, a caption keeps its column's name.
      image: column of the image or of its path.
      folder: folder that relative paths start from.
      outside: whether paths and links may lead out of that folder.
    """

    captions: tuple[str, ...] = ()
    image: str = ""
    folder: str = ""
    outside: bool = False


class OutsideError(OSError):
    """A path or a link leads out of the folder of a source."""


def printable(text: str) -> str:
    """Replaces what UTF-8 cannot encode."""
    return text.encode("utf-8", errors="replace").decode()


def is_path(name: str) -> bool:
    """Returns whether a file can have this name; others make system calls raise ValueError."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def read_file(path: epath.PathLike, root: epath.PathLike, outside: bool) -> bytes:
    """Reads a file of a source.

    Args:
      root: folder that the file must be in, after following links, unless `outside`.

    Raises:
      OutsideError: it is not in `root`.
      OSError: it cannot be read, or is no regular file: a pipe would block.
    """
    if "://" in os.fspath(path):
        return epath.Path(path).read_bytes()
    real = os.path.realpath(path)
    if not outside and not Path(real).is_relative_to(os.path.realpath(root)):
        raise OutsideError(errno.EACCES, f"{real} is not in {root}; see --allow_outside")
    if not stat.S_ISREG(os.stat(real).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return Path(real).read_bytes()


def collapse(text: str) -> str:
    """Collapses white space."""
    return " ".join(text.split())


def find_captions(
    row: Mapping[str, Any], columns: tuple[str, ...] = ()
) -> tuple[Caption, ...] | None:
    """Returns the captions of a row, or None if it has no column of captions.

    A value may be a string, a list of strings, or a list of mappings with a "raw" or "caption".

    Args:
      columns: take the captions of all these columns, by name; () takes the first of
        CAPTION_COLUMNS that the row has.
    """
    if columns:
        named = len(columns) > 1
        present = [(name, name if named else "") for name in columns if name in row]
    else:
        present = [(name, "") for name in CAPTION_COLUMNS if row.get(name) is not None][:1]
    if not present:
        return None
    found = {}  # a dict, to drop repetitions
    for column, source in present:
        value = row[column]
        for text in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(text, Mapping):
                text = text.get("raw", text.get("caption"))
            if isinstance(text, str) and collapse(text):
                found.setdefault(collapse(text), source)
    return tuple(Caption(text, source) for text, source in found.items())


def find_scores(row: Mapping[str, Any]) -> dict[str, float]:
    """Returns the scores in a row; a value that is no number is left out."""
    lower = {str(key).lower(): value for key, value in row.items()}
    found = {}
    for name in SCORES:
        value = lower.get(name)
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                found[name] = float(value)
            except (ValueError, OverflowError):
                continue
    return {name: value for name, value in found.items() if value == value}  # drops NaN


def find_license(row: Mapping[str, Any]) -> str:
    """Returns the license in a row, "" if it has none."""
    return next((collapse(str(row[c])) for c in LICENSE_COLUMNS if row.get(c)), "")


def files_below(root: epath.Path, suffix: str = "") -> Iterator[epath.Path]:
    """Yields all files below a folder, sorted, except hidden ones. Works on buckets too."""
    for path in sorted(root.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from files_below(path, suffix)
        elif path.name.lower().endswith(suffix):
            yield path


def common_folder(paths: Sequence[epath.Path]) -> epath.Path:
    """Returns the deepest folder that holds all paths."""
    root = paths[0].parent
    while not all(path.is_relative_to(root) for path in paths):
        root = root.parent
    return root
