"""Reading the small files of an encoder's folder, and hashing all of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from imagen_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: the file is missing, or holds something else.
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
    """The hash of the files' contents one after another, and then of `more`."""
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    digest.update(more)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """A library's message on one line, without the places in the library's source."""
    return (str(error).splitlines() or [type(error).__name__])[0].partition(" [source loc")[0]
