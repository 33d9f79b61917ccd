"""Paths that may be in a bucket: gs://BUCKET/FOLDER, through etils and fsspec.

A bucket has no renames, no appending, no locks and no folders. An object appears complete or not at
all. Local paths are pathlib.Path, others epath.Path, which has most of its methods; the functions
here are for the rest.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from imagen_jax.common.errors import UserError, first_line

# Scheme -> the package through which fsspec opens it, and the extra that installs it.
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}


def is_remote(path: str | os.PathLike) -> bool:
    """Returns whether a path is in a bucket."""
    return "://" in os.fspath(path)


def check(path: str | os.PathLike) -> None:
    """Raises UserError for a path in a store that cannot be read: see PACKAGES."""
    scheme, remote, _ = os.fspath(path).partition("://")
    if not remote:
        return
    if scheme not in PACKAGES:
        schemes = " or ".join(f"{name}://" for name in PACKAGES)
        raise UserError(f"{os.fspath(path)}: {scheme}:// is not read; use a folder, {schemes}")
    import fsspec

    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as e:
        package = PACKAGES[scheme]
        raise UserError(
            f"{os.fspath(path)} needs {package}; install it with: pip install {package}"
        ) from e


def to_path(path: str | os.PathLike, absolute: bool = False) -> Path:
    """Returns a pathlib.Path, or an epath.Path for a path in a bucket.

    Args:
      absolute: make a local path absolute.

    Raises:
      UserError: as `check`.
    """
    if not is_remote(path):
        return Path(path).absolute() if absolute else Path(path)
    check(path)
    from etils import epath

    # Callers report errors in one line; gcsfs would also log a stack trace.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    return epath.Path(path)


@contextlib.contextmanager
def as_os_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns what the client of a bucket raises into an OSError that names `path`.

    A missing object stays a FileNotFoundError, an existing one a FileExistsError.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, UserError):
        raise
    except Exception as e:
        if not is_remote(path):
            raise
        raise OSError(errno.EIO, first_line(e), os.fspath(path)) from e


def create(path: Path, data: bytes) -> None:
    """Writes an object in a bucket, unless it exists, as one atomic step.

    Raises:
      FileExistsError: it exists.
    """
    system, name = _open(path)
    system.pipe_file(name, data, mode="create")


def size(path: Path) -> int:
    """Returns the bytes of a file."""
    found = path.stat()
    return found.length if is_remote(path) else found.st_size


def files_below(folder: Path) -> list[Path]:
    """Returns all files in a folder and its subfolders, sorted; [] if there is no folder."""
    if not is_remote(folder):
        return sorted(p for p in folder.rglob("*") if p.is_file())
    system, root = _open(folder)
    return sorted(folder / name[len(root) + 1 :] for name in system.find(root))


def move_folder(folder: Path, to: Path) -> None:
    """Renames a folder; in a bucket, copies its objects and deletes them."""
    if is_remote(folder):
        system, name = _open(folder)
        system.mv(name, _open(to)[1], recursive=True)
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(to)


def _open(path: Path):
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(path))
