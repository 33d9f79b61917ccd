"""Files that appear whole or not at all, and folders that can be written."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from imagen_jax.common.errors import UserError

P = TypeVar("P")


@contextlib.contextmanager
def replacing(path: P) -> Iterator[P]:
    """A temporary name beside `path` to write to; renamed to `path` at the end, deleted on errors.

    Readers therefore see a whole file or none, and hosts that write the same file do not collide.
    `path` is a pathlib.Path or an epath.Path.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, or none."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Writes a whole JSON file, indented, or none."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def probe_folder(folder: Path) -> None:
    """Makes a folder if it is not there; raises OSError if nothing can be written to it."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def make_folder(folder: Path, flag: str) -> None:
    """Makes the folder that a flag names, and finds out before the work if it can be written.

    Raises:
      UserError: it cannot.
    """
    try:
        probe_folder(folder)
    except OSError as e:
        raise UserError(f"--{flag}={folder} cannot be written: {e.strerror}") from e


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        UserError: the file is missing, or does not hold a JSON object.
    """
    try:
        fields = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"text encoder {str(path.parent)!r}: cannot read {path.name}") from e
    except ValueError as e:
        raise UserError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds a {type(fields).__name__}; it must be a JSON object")
    return fields


def sha256(files: Iterable[Path], more: bytes = b"") -> str:
    """Hashes the contents of the files in order, followed by `more`."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    digest.update(more)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """Returns the first line of a library's message, without its source locations."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" [source loc")[0]
