"""The manifest of a dataset: what it holds, where it comes from, and a hash of every file.

manifest.json is written last, so a dataset with a manifest is complete. Its `digest` is a hash of
everything else in it, so an edit by hand is noticed.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

from etils import epath

from data_pipelines.records.prepared import MANIFEST, reading
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_json

_AGAIN = "prepare the dataset again, with --overwrite"


def write(folder: epath.Path, fields: dict[str, Any]) -> None:
    """Writes the manifest, with its digest."""
    write_json(folder / MANIFEST, {**fields, "digest": digest(fields)})


def read(folder: epath.Path) -> dict[str, Any]:
    """Reads the manifest and checks its digest, and that every shard has the recorded size.

    Raises:
      UserError: there is no manifest; it is not the one that was written; or a shard is missing or
        has another size.
    """
    path = folder / MANIFEST
    try:
        fields = json.loads(path.read_text())
        stored = fields.pop("digest")
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as e:
        raise UserError(f"{path}: damaged ({type(e).__name__}: {e}); {_AGAIN}") from e
    if stored != digest(fields):
        raise UserError(f"{path}: edited since it was written; restore it, or {_AGAIN}")
    with reading(path):
        shards = [
            (folder / shard["file"], shard["bytes"])
            for split in fields["splits"].values()
            for shard in split["shards"]
        ]
        sizes = [file.stat().length if file.exists() else None for file, _ in shards]
    for (file, recorded), size in zip(shards, sizes, strict=True):
        if size != recorded:
            found = "missing" if size is None else f"{size} bytes"
            raise UserError(
                f"{file}: {found}; {path.name} says {recorded} bytes. Restore it, or {_AGAIN}"
            )
    return fields


def digest(fields: dict[str, Any]) -> str:
    """Returns the hash of a manifest."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
