"""WebDataset tars, such as img2dataset writes: key.jpg + key.txt + key.json.

A key is the part of a name before the first dot of its last component. The files of a key follow
each other; a key that comes again later is a duplicate. Ids are TAR/KEY, because tars of different
downloads have the same keys. Each image of a key becomes a record with the captions of that key. A
caption comes from key.txt, else from key.json; --caption_columns takes it from columns of key.json.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import partial

from etils import epath

from data_pipelines.common import Skip
from data_pipelines.ingestion import items
from data_pipelines.ingestion.items import Columns, Item, Part, Source, common_folder
from imagen_jax.common.errors import UserError

_TEXT = ("txt", "caption", "text")
_LONGEST_TEXT = 2**20  # bytes; longer text files are not captions


def find(paths: list[epath.Path], columns: Columns, part_size: int) -> Source:
    """Lists tars, or those below a folder. Each one is a part."""
    del part_size
    root = paths[0] if paths[0].is_dir() else common_folder(paths)
    tars = list(items.files_below(paths[0], ".tar")) if paths[0].is_dir() else paths
    parts = []
    for tar in tars:
        prefix = str(tar.relative_to(root))[: -len(tar.suffix)]
        size = tar.stat().length
        read = partial(read_tar, str(tar), prefix, columns.captions)
        parts.append(Part(str(tar), size, f"{prefix} {size} {columns.captions}", read))
    return Source("webdataset", str(paths[0]), parts, [])


def read_tar(path: str, prefix: str, captions: tuple[str, ...]) -> Iterator[Item | Skip]:
    """Yields the items of a tar, in order. Nothing is unpacked to the disk.

    Raises:
      UserError: the file cannot be read to its end.
    """
    key, files, seen = None, {}, set()
    try:
        with (
            epath.Path(path).open("rb") as opened,
            tarfile.open(fileobj=opened, mode="r|*", tarinfo=_Member) as tar,
        ):
            for member in tar:
                if not member.isfile():
                    continue
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                if not stem:  # a hidden file
                    continue
                stem = f"{folder}/{stem}".lstrip("/")
                if stem != key:
                    yield from _items(prefix, key, files, captions)
                    key, files = stem, {}
                    if stem in seen:
                        yield Skip(items.printable(f"{prefix}/{stem}"), items.DUPLICATE_KEY)
                    repeated = stem in seen
                    seen.add(stem)
                if not repeated:
                    files[suffix.lower()] = _read(tar, member)
    except PermissionError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror}") from e
    except (tarfile.TarError, EOFError, OSError) as e:
        # What was read so far is discarded with the part, unless damage is tolerated.
        yield from _items(prefix, key, files, captions)
        raise UserError(f"{path}: damaged or cut short: {str(e).splitlines()[0]}") from e
    yield from _items(prefix, key, files, captions)


class _Member(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a broken one for the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.EOFHeaderError:  # the mark at the end
            raise
        except tarfile.HeaderError as e:
            raise tarfile.ReadError(f"no end of the archive ({e})") from e


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    data = tar.extractfile(member).read()
    if len(data) < member.size:
        raise EOFError(f"{member.name} has {len(data)} of its {member.size} bytes")
    return data


def _items(
    prefix: str, key: str | None, files: dict[str, bytes], columns: tuple[str, ...]
) -> Iterator[Item | Skip]:
    """Yields an item for each image of a key."""
    if key is None or not files:
        return
    name = items.printable(f"{prefix}/{key}")
    images = {
        s: data for s, data in files.items() if f".{s.split('.')[-1]}" in items.IMAGE_SUFFIXES
    }
    row = {}
    if "json" in files:
        try:
            row = json.loads(files["json"])
        except ValueError:
            yield Skip(name, "unreadable json")
    row = row if isinstance(row, dict) else {}
    text = next((files[s] for s in _TEXT if s in files), None)
    captions = items.find_captions(row, columns) if columns or text is None else None
    if captions is None and text is not None:
        try:
            captions = items.find_captions({"text": text[:_LONGEST_TEXT].decode("utf-8-sig")})
        except UnicodeDecodeError:
            yield Skip(name, "caption not UTF-8")
            return
    if not images:
        yield Skip(name, "missing image")
    elif captions is None:
        yield Skip(name, "missing caption")
    elif not captions:
        yield Skip(name, "empty caption")
    else:
        scores, license = items.find_scores(row), items.find_license(row)
        for suffix, image in images.items():
            each = name if len(images) == 1 else f"{name}.{suffix}"
            yield Item(each, image, captions, scores, license)
