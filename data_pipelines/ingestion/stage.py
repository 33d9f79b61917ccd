"""Reads one part of a source and writes its records to a file beside a summary.

A part has three files, named by a hash of the part and of the options that its records depend on.
The JSON file is written last, so a part that has it is finished.

  NAME.tfrecord  the accepted records
  NAME.npz       for each record: `content` and `look` (hashes of the file and of the look of the
                 image), `rank` (its place in the draw for the validation split) and `start` (bytes)
  NAME.json      a Summary, and the ids of the records
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from data_pipelines.common import Skip
from data_pipelines.ingestion import filters, images
from data_pipelines.ingestion.items import DUPLICATE_KEY, Caption, Item, Part
from data_pipelines.ingestion.options import Options
from data_pipelines.ingestion.summary import Summary
from data_pipelines.records import splits, tars, tfrecord
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import replacing, write_text

# Called with the items and the bytes of images that were read.
Progress = Callable[[int, int], None]


class Task(NamedTuple):
    """A part to stage.

    Attributes:
      prefix: goes before the ids of its items, if there are several sources.
    """

    part: Part
    prefix: str
    options: Options
    folder: str
    skip_damaged: bool

    @property
    def name(self) -> str:
        key = (self.part.fingerprint, self.prefix, sorted(self.options.staging.items()))
        return hashlib.sha256(ascii(key).encode()).hexdigest()[:24]

    def file(self, suffix: str) -> epath.Path:
        return epath.Path(self.folder) / f"{self.name}{suffix}"

    @property
    def done(self) -> bool:
        return self.file(".json").exists()

    def summary(self) -> dict[str, Any]:
        return json.loads(self.file(".json").read_text())


def stage(task: Task, progress: Progress) -> None:
    """Writes the files of a part, unless they exist.

    Raises:
      UserError: the source is damaged.
    """
    if task.done:
        return
    options, summary = task.options, Summary()
    rows: dict[str, list] = {"content": [], "look": [], "rank": [], "start": []}
    ids, position = [], 0
    with replacing(task.file(".tfrecord")) as temporary, temporary.open("wb") as file:
        for item in _read(task):
            summary.items += 1
            if isinstance(item, Skip):
                if item.reason == DUPLICATE_KEY and not task.skip_damaged:
                    raise UserError(
                        f"{task.part.label}: the key of {item.name} occurs twice. {tars.ONCE}. "
                        "Repair it, or keep the first with --skip_damaged; finished parts are kept"
                    )
                summary.add("rejected", item)
                progress(1, 0)
                continue
            item = item._replace(id=task.prefix + item.id)
            if accepted := _accept(item, options, summary):
                record, look = accepted
                framed = tfrecord.frame(tfrecord.encode(record))
                file.write(framed)
                rows["content"].append(hashlib.sha256(item.image).digest()[:16])
                rows["look"].append(look)
                rank = splits.rank(options.seed, item.id)[:8]
                rows["rank"].append(int.from_bytes(rank, "big"))
                rows["start"].append(position)
                position += len(framed)
                ids.append(item.id)
            progress(1, len(item.image))
    types = {"content": "S16", "look": np.uint64, "rank": np.uint64, "start": np.int64}
    with replacing(task.file(".npz")) as temporary, temporary.open("wb") as file:
        np.savez(file, **{key: np.array(rows[key], type) for key, type in types.items()})
    write_text(task.file(".json"), json.dumps({**summary.to_json(), "ids": ids}))


def _read(task: Task) -> Iterator[Item | Skip]:
    try:
        yield from task.part.read()
    except UserError as e:
        if not task.skip_damaged:
            raise UserError(
                f"{e}. Repair it, or take what can be read of it with --skip_damaged; finished "
                "parts are kept"
            ) from e
        yield Skip(task.part.label, "damaged source", str(e))


def _accept(item: Item, options: Options, summary: Summary) -> tuple[dict[str, Any], int] | None:
    """Returns the record of an item and the hash of its look, or counts why there is none."""
    if refused := filters.by_scores(item, options):
        _reject(refused, item, summary)
        return None
    checked = filters.by_captions(item, options)
    if isinstance(checked, Skip):
        _reject(checked, item, summary)
        return None
    captions, changes = checked
    limits = images.Limits(*(getattr(options, field) for field in images.Limits._fields))
    converted = images.convert(item.id, item.image, limits)
    if isinstance(converted, Skip):
        _reject(converted, item, summary)
        return None
    if refused := filters.by_detector(item, converted.image, options):
        _reject(refused, item, summary)
        return None
    size = f"{converted.size[0]}x{converted.size[1]}"
    for change in (*changes, *(Skip(item.id, what, size) for what in converted.changes)):
        summary.add("changed", change)
    _count(item, converted, captions, summary)
    look = _look(converted.image) if options.duplicates == "near" else 0
    return record(item.id, converted.data, [caption for caption, _ in captions]), look


def record(name: str, image: bytes, captions: list[Caption]) -> dict[str, Any]:
    """Returns the features of a record; see records.dataset.features."""
    values = {
        "id": name,
        "image": image,
        "caption": captions[0].text,
        "captions": [caption.text for caption in captions],
        "category": "",
        "scene": "",
    }
    if any(caption.source for caption in captions):
        values["caption_sources"] = [caption.source for caption in captions]
    return values


def _reject(skip: Skip, item: Item, summary: Summary) -> None:
    summary.add("rejected", skip)
    # Decoding takes time, so only the first few of each reason can be shown.
    if summary.counts["rejected"][skip.reason] <= 4 and (small := images.preview(item.image)):
        summary.show(skip, small)


def _count(
    item: Item, converted: images.Converted, captions: list[tuple[Caption, str]], summary: Summary
) -> None:
    summary.accepted += 1
    low, high = sorted(converted.size)
    summary.count("shorter side", low)
    summary.count("aspect ratio", high / low)
    summary.count("format", converted.format)
    summary.count("captions of an image", len(captions))
    summary.count("license", item.license[:80] or "unknown")
    for caption, code in captions:
        summary.count("words in a caption", len(caption.text.split()))
        summary.count("language", code)
    for score in item.scores:
        summary.count("score", score)


def _look(image) -> int:
    """Returns the 64-bit perceptual hash of an image (a DCT of its gray values)."""
    import imagehash  # imports SciPy

    return int.from_bytes(np.packbits(imagehash.phash(image).hash).tobytes(), "big")
