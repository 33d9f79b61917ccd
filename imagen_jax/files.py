"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to, renamed to `path` once that is done."""
    temporary = path.with_name(f".{path.name}.tmp")
    yield temporary
    temporary.replace(path)
