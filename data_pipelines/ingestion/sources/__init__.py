"""Finds the format of a source and lists its parts.

A source is PATH or KIND:PATH. Without a kind, the format is recognized from what is there.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

from etils import epath

from data_pipelines.ingestion.items import IMAGE_SUFFIXES, Columns, Source
from data_pipelines.ingestion.sources import coco, folder, listed, parquet, webdataset
from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError

# Lists a source: (the files or the folder, the columns, candidates in a part) -> Source.
KINDS: dict[str, Callable[[list[epath.Path], Columns, int], Source]] = {
    "webdataset": webdataset.find,
    "parquet": parquet.find,
    "coco": coco.find,
    "folder": folder.find,
    "list": listed.find,
}
_SUFFIXES = {
    ".tar": "webdataset",
    ".parquet": "parquet",
    ".csv": "list",
    ".tsv": "list",
    ".jsonl": "list",
}
_BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def find(spec: str, columns: Columns, part_size: int) -> Source:
    """Lists the source that `spec` names.

    Args:
      spec: "PATH" or "KIND:PATH". A path may have * and ? in its last part, or {000..123}.

    Raises:
      UserError: there is no such path, its format is not supported or it holds no image.
    """
    kind, path = _parse(spec)
    paths = _expand(spec, path)
    kind = kind or _recognize(spec, paths)
    try:
        found = KINDS[kind](paths, columns, part_size)
    except OSError as e:
        raise UserError(f"--source={spec} cannot be read: {e.strerror or e}") from e
    if not found.parts:
        reasons = Counter(skip.reason for skip in found.skipped)
        listing = ", ".join(f"{reason} {n}" for reason, n in reasons.most_common()) or "nothing"
        raise UserError(
            f"--source={spec} has no image with a caption, read as {kind!r}; found: {listing}. "
            f"For another format write --source=KIND:PATH, with KIND one of {', '.join(KINDS)}"
        )
    return found._replace(path=path)


def _parse(spec: str) -> tuple[str, str]:
    kind, colon, path = spec.partition(":")
    if not colon or path.startswith("//"):  # such as gs://bucket
        return "", spec
    if kind not in KINDS:
        raise UserError(f"--source={spec}: no kind {kind!r}; allowed: {', '.join(KINDS)}")
    return kind, path


def _expand(spec: str, path: str) -> list[epath.Path]:
    """Returns the existing paths that `path` names, sorted."""
    buckets.check(path)
    if braces := _BRACES.search(path):
        first, last = braces.groups()
        numbers = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
        paths = [epath.Path(path[: braces.start()] + n + path[braces.end() :]) for n in numbers]
        if missing := [p for p in paths if not p.exists()]:
            raise UserError(f"--source={spec}: {missing[0]} does not exist")
        return paths
    whole = epath.Path(path)
    if whole.exists():
        return [whole]
    matches = sorted(whole.parent.glob(whole.name)) if re.search("[*?]", whole.name) else []
    if not matches:
        raise UserError(f"--source={spec} does not exist")
    return matches


def _recognize(spec: str, paths: list[epath.Path]) -> str:
    """Returns the kind of the source, from its suffix or from what its folder holds."""
    suffix = paths[0].suffix.lower()
    if not paths[0].is_dir():
        if suffix == ".json":
            return "coco" if coco.is_coco(paths[0]) else "list"
        if suffix in _SUFFIXES:
            return _SUFFIXES[suffix]
        raise UserError(
            f"--source={spec} is a {suffix or 'nameless'} file; supported: a folder, "
            f"{', '.join(sorted([*_SUFFIXES, '.json']))}"
        )
    top = paths[0]
    files = [p for p in top.iterdir() if not p.name.startswith(".")]
    below = [p for sub in files if sub.is_dir() for p in sub.iterdir()]
    count = Counter(p.suffix.lower() for p in (*files, *below))
    if count[".tar"]:
        return "webdataset"
    if coco.annotation_files(top):
        return "coco"
    if count[".parquet"] and not any(count[s] for s in IMAGE_SUFFIXES):
        return "parquet"
    return "folder"
