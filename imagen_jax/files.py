"""Files that appear whole or not at all, and folders that can be written."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from imagen_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to `path` once that is done."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a whole text file, or none."""
    with replacing(path) as temporary:
        temporary.write_text(text)


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
