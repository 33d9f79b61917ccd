"""Atomic file writes, checks for writable folders, and hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError

P = TypeVar("P")


@contextlib.contextmanager
def replacing(path: P) -> Iterator[P]:
    """Yields a temporary path next to `path`; renames it to `path` at the end, or deletes it.

    Readers see the whole file or none, and hosts that write the same file do not collide. For a
    path such as gs://bucket/file, the temporary file is local and is uploaded at the end: buckets
    have no rename, but show an object only when it is complete.

    Args:
      path: a pathlib.Path or an epath.Path.
    """
    if buckets.is_remote(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (temporary := Path(folder) / path.name)
            with buckets.as_os_errors(path), temporary.open("rb") as file, path.open("wb") as to:
                shutil.copyfileobj(file, to)
        return
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def matching(patterns: Iterable[str], flag: str) -> list[str]:
    """Returns the files that match paths with * and ?, sorted.

    Args:
      flag: the flag that has the patterns.

    Raises:
      UserError: a pattern matches nothing.
    """
    from etils import epath

    files = set()
    for pattern in patterns:
        path = epath.Path(pattern)
        matches = [path] if path.exists() else list(path.parent.glob(path.name))
        if not matches:
            raise UserError(f"--{flag} has {pattern!r}; there is no such file")
        files.update(os.fspath(match) for match in matches)
    return sorted(files)


def write_text(path: Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, value: Any) -> None:
    """Writes an indented JSON file atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def probe_folder(folder: Path) -> None:
    """Creates a folder if missing; raises OSError if it cannot be written."""
    if buckets.is_remote(folder):
        probe = folder / f".{uuid.uuid4().hex}.tmp"
        with replacing(probe) as temporary:
            temporary.touch()
        probe.unlink()
        return
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def make_folder(folder: Path, flag: str) -> None:
    """Creates the folder that a flag names, if missing, and checks that it can be written.

    Raises:
      UserError: it cannot be written.
    """
    with _writing(folder, flag):
        probe_folder(folder)


def check_folder(folder: Path, flag: str) -> None:
    """Checks that the folder that a flag names can be written or created; creates nothing.

    Raises:
      UserError: it cannot be written.
    """
    with _writing(folder, flag):
        if buckets.is_remote(folder):
            probe_folder(folder)
        else:
            probe_folder(next(p for p in (folder, *folder.absolute().parents) if p.exists()))


def check_new_folder(folder: Path, flag: str) -> None:
    """Checks that `new_folder` can make the folder; creates nothing.

    Raises:
      UserError: it is not empty, or cannot be written.
    """
    remote = buckets.is_remote(folder)
    with _writing(folder, flag), buckets.as_os_errors(folder):
        if folder.is_dir():
            if any(folder.iterdir()):
                raise UserError(f"--{flag}={folder} is not empty; name a new folder")
        elif folder.exists():
            raise UserError(f"--{flag}={folder} is a file; name a new folder")
    check_folder(folder if remote else folder.absolute().parent, flag)


@contextlib.contextmanager
def new_folder(folder: Path, flag: str, mode: int = 0o777) -> Iterator[Path]:
    """Yields a temporary folder next to `folder`; renames it at the end, or deletes it.

    Check `folder` first, before slow work. The block should do no more than write to the temporary
    folder: an OSError is taken as a failure to write.

    In a bucket, the temporary folder is local, and its files are uploaded at the end.

    Args:
      mode: permissions of the folder.

    Raises:
      UserError: `folder` is not empty, or cannot be written.
    """
    if buckets.is_remote(folder):
        with tempfile.TemporaryDirectory() as name, _writing(folder, flag):
            yield Path(name)
            for path in buckets.files_below(Path(name)):
                with replacing(folder / path.relative_to(name).as_posix()) as copy:
                    shutil.copyfile(path, copy)
        return
    folder = folder.absolute()
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.tmp")
    try:
        with _writing(folder, flag):
            temporary.mkdir(mode, parents=True)
            yield temporary
            temporary.replace(folder)  # an empty folder of this name is replaced
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


@contextlib.contextmanager
def _writing(folder: Path, flag: str) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise UserError(f"--{flag}={folder} cannot be written: {e.strerror or e}") from e


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in a file.

    Raises:
      UserError: the file cannot be read, or does not hold a JSON object.
    """
    try:
        with buckets.as_os_errors(path):
            fields = json.loads(path.read_bytes())
    except OSError as e:
        raise UserError(f"{path}: cannot be read ({e.strerror or e})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}: not valid JSON ({e})") from e
    if not isinstance(fields, dict):
        raise UserError(f"{path}: holds a {type(fields).__name__}; it must be a JSON object")
    return fields


def sha256(files: Iterable[Path], more: bytes = b"") -> str:
    """Hashes the contents of the files in order, followed by `more`."""
    digest = hashlib.sha256()
    for path in files:
        with buckets.to_path(path).open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    digest.update(more)
    return digest.hexdigest()
