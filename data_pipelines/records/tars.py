"""WebDataset tars, read in place through an index of their members.

    tars.json            all tars with size and number of samples, and the records of each split
    index/TAR-HASH.npy   where the image and the caption of each sample of a tar are
    index/TAR-HASH.json  its entry of tars.json; written last

A sample is the files of a tar with the same key, which is a name up to its first dot, one after
the other: an image, and a caption in .txt or .json, as img2dataset writes them. Its id is TAR/KEY,
because tars of different downloads have the same keys. The index of a tar is complete or absent, so
any number of processes may build them, and a later run goes on with the others. Indices
are memory-mapped, and members are read by position; nothing is unpacked.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from data_pipelines.records.files import Files
from data_pipelines.records.prepared import TARS
from data_pipelines.records.source import Bad, Ranges, Record
from imagen_jax.common.errors import UserError, first_line
from imagen_jax.common.files import replacing, write_json

IMAGES = ("jpg", "jpeg", "png", "webp")
CAPTIONS = ("txt", "json")
# The byte ranges of a sample; a size of 0 means that it has no such file.
_RANGES = [(name, "<i8", (2,)) for name in ("image", *CAPTIONS)]
_END = 1024  # bytes of zeros that end every tar
_LEAST, _MOST = 16, 10_000  # records held out

ONCE = "A tar has each key once, and the files of a key follow each other (tar --sort=name)"


class Tar(NamedTuple):
    """An indexed tar: its path, bytes, samples, and the files that belong to none."""

    path: str
    size: int
    samples: int
    skipped: int


def index_tar(path: str, folder: epath.Path) -> Tar:
    """Indexes a tar unless it is, and returns what tars.json says about it.

    Raises:
      UserError: it cannot be read, is compressed or cut short, has a key twice, or has no sample.
    """
    file = _index_file(path, folder, ".npy")
    entry = file.with_suffix(".json")
    try:
        size = epath.Path(path).stat().length
        if entry.exists() and (done := _read(entry)) and done.size == size:
            return done
        index, skipped = _samples(path, size)
    except (OSError, tarfile.TarError) as e:
        raise UserError(f"{path}: not a complete, uncompressed tar: {first_line(e)}") from e
    if not len(index):
        names = f"NAME.{', .'.join(IMAGES)} with NAME.{' or NAME.'.join(CAPTIONS)}"
        raise UserError(f"{path}: no sample in {skipped} files; allowed: {names}")
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, temporary.open("wb") as opened:
        np.save(opened, index)
    tar = Tar(path, size, len(index), skipped)
    write_json(entry, list(tar))
    return tar


def _read(entry: epath.Path) -> Tar | None:
    """Reads what `index_tar` wrote last about a tar; None if it is damaged."""
    try:
        return Tar(*json.loads(entry.read_bytes()))
    except (ValueError, TypeError):
        return None


def write_tars(folder: epath.Path, tars: Sequence[Tar], fraction: float) -> dict[str, int]:
    """Writes tars.json; returns the records of each split. The last records are held out.

    Args:
      fraction: share to hold out, at least 16 and at most 10,000 records.
    """
    total = sum(tar.samples for tar in tars)
    held_out = min(max(round(total * fraction), _LEAST), _MOST, total // 2) if fraction else 0
    splits = {"train": total - held_out, "validation": held_out}
    splits = {name: num for name, num in splits.items() if num}
    write_json(folder / TARS, {"splits": splits, "tars": [list(tar) for tar in tars]})
    return splits


class Tars(Ranges):
    """A source over indexed tars, as records.source.Source.

    Args:
      path: tars.json.
      split: "train" or "validation".
    """

    def __init__(self, path: epath.Path, split: str):
        info = json.loads(path.read_text())
        self._tars = [Tar(*tar) for tar in info["tars"]]
        super().__init__([tar.samples for tar in self._tars])
        self.files, self._folder = Files(), path.parent
        # The folder that has all tars. (os.path.commonpath would make gs://bucket gs:/bucket.)
        shared = os.path.commonprefix([tar.path for tar in self._tars])  # noqa: RUF071
        self._top = len(shared.rpartition("/")[0])
        self._first = info["splits"]["train"] if split == "validation" else 0
        self._num = info["splits"][split]
        self._index = functools.lru_cache(1024)(self._open_index)

    def __len__(self) -> int:
        return self._num

    def read(self, start: int, stop: int) -> list[Record | Bad]:
        found: list[Record | Bad] = []
        for tar, first, until in self.split(self._first + start, self._first + stop):
            found += self._read_tar(self._tars[tar], self._index(tar)[first:until])
        return found

    def _open_index(self, number: int) -> np.ndarray:
        """Opens the index of a tar.

        Raises:
          UserError: it is missing, or is that of another tar.
        """
        tar = self._tars[number]
        again = "run the same data_pipelines.index_tars command again"
        try:
            index = self.files.array(str(_index_file(tar.path, self._folder, ".npy")))
            size = epath.Path(tar.path).stat().length
        except (OSError, ValueError) as e:
            raise UserError(f"{tar.path} or its index: {first_line(e)}; {again}") from e
        if size != tar.size or len(index) != tar.samples:
            raise UserError(
                f"{tar.path} has {size:,} bytes, but the index in {self._folder} is of a tar with "
                f"{tar.size:,}; {again}"
            )
        return index

    def _read_tar(self, tar: Tar, rows: np.ndarray) -> list[Record | Bad]:
        keys = [key.decode(errors="replace") for key in rows["key"].tolist()]
        name = tar.path[self._top :].lstrip("/").removesuffix(".tar")
        ranges = np.stack([rows[field] for field, *_ in _RANGES], axis=1)
        present = ranges[..., 1] > 0
        start = int(ranges[..., 0][present].min())
        end = int(ranges.sum(axis=2)[present].max())
        try:
            data = self.files.read(tar.path, start, end - start)
        except OSError as e:
            return [Bad("unreadable file", f"{tar.path}: {first_line(e)}", key) for key in keys]

        def part(at: np.ndarray) -> bytes:
            return data[at[0] - start : at[0] - start + at[1]]

        return [
            _record(f"{name}/{key}", *map(part, row)) for key, row in zip(keys, ranges, strict=True)
        ]


def _record(name: str, image: bytes, text: bytes, fields: bytes) -> Record | Bad:
    captions = [text.decode(errors="surrogateescape")]
    if not text.strip():
        try:
            found = json.loads(fields)
            captions = found.get("captions") or found.get("caption")
            captions = [captions] if isinstance(captions, str) else list(captions or ())
        except (ValueError, AttributeError, TypeError):
            return Bad("caption cannot be read", "", name)
    captions = [" ".join(c.split()) for c in captions if isinstance(c, str) and c.strip()]
    return Record(name, image, tuple(captions)) if captions else Bad("no caption", "", name)


def _samples(path: str, size: int) -> tuple[np.ndarray, int]:
    """Returns the index of a tar, and its number of files that are of no sample.

    Raises:
      OSError, tarfile.TarError: it cannot be read, or is cut short.
      UserError: it has a key twice.
    """
    keys, rows, skipped, seen = [], [], 0, set()
    for key, members in _groups(path, size):
        if key in seen:
            raise UserError(f"{path}: the key {key!r} occurs twice. {ONCE}")
        seen.add(key)
        image = next((members[suffix] for suffix in IMAGES if suffix in members), None)
        found = {suffix: members[suffix] for suffix in CAPTIONS if suffix in members}
        if image and found:
            keys.append(key.encode(errors="surrogateescape"))
            rows.append({"image": image, **found})
        else:
            skipped += len(members)
    index = np.zeros(len(rows), [("key", f"S{max(map(len, keys), default=1)}"), *_RANGES])
    index["key"] = keys
    for i, row in enumerate(rows):
        for field, at in row.items():
            index[field][i] = at
    return index, skipped


def _groups(path: str, size: int) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Yields the files of each sample: its name, and suffix -> byte range."""
    key, members = "", {}
    with epath.Path(path).open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        file.seek(max(0, size - _END))
        if any(file.read(_END)):  # tarfile takes a tar that is cut between two files for whole
            raise tarfile.ReadError("the end is missing")
        for member in tar:
            tar.members = []  # or it keeps all
            if not member.isfile():
                continue
            if member.offset_data + member.size > size:
                raise tarfile.ReadError(f"{member.name} is cut short")
            name, _, suffix = member.name.rpartition("/")[2].partition(".")
            name = member.name[: len(member.name) - len(suffix) - 1]
            if name != key and members:
                yield key, members
                members = {}
            key = name
            members[suffix.lower()] = (member.offset_data, member.size)
    if members:
        yield key, members


def _index_file(path: str, folder: epath.Path, suffix: str) -> epath.Path:
    digest = hashlib.sha256(path.encode()).hexdigest()[:16]
    return epath.Path(folder) / "index" / f"{epath.Path(path).stem}-{digest}{suffix}"
