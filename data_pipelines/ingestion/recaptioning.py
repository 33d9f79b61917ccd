"""Copies a dataset and adds rewritten captions to those that its images have."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from data_pipelines.ingestion import card, finishing, shards, stage
from data_pipelines.ingestion.items import Caption, collapse
from data_pipelines.ingestion.layout import Piece, Shard
from data_pipelines.ingestion.rewriters import Rewriter
from data_pipelines.ingestion.run import Embed
from data_pipelines.ingestion.workers import local
from data_pipelines.records import manifest, prepared, tfrecord
from imagen_jax.common import html
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_json, write_text

ORIGINAL = "caption"  # the source of captions that had no name


class Job(NamedTuple):
    """What to make.

    Attributes:
      task: the dataset to read.
      name: the dataset to write.
      source: name of the rewritten captions.
      settings: JSON-able; everything that the rewritten captions depend on.
      limit: a TokenLimit, which longer captions are truncated to; None for no limit.
    """

    data_dir: str
    task: str
    name: str
    source: str
    rewrite: Rewriter
    batch_size: int
    settings: dict[str, Any]
    limit: Any = None
    embed: Embed | None = None
    date: str = ""


def run(job: Job) -> epath.Path:
    """Writes the dataset, or what an interrupted run left out of it; returns its folder.

    Raises:
      UserError: there is no dataset to read; the one to write exists, or was begun with other
        settings.
    """
    there = prepared.find(job.data_dir, job.task)
    folder = epath.Path(job.data_dir) / job.name / prepared.VERSION
    if (folder / prepared.MANIFEST).exists():
        raise UserError(f"{folder} exists; choose another --name")
    _begin(folder / prepared.WORK, job)
    info = tfds.builder_from_directory(there).info
    tasks = []
    for split in info.splits.values():
        paths = [epath.Path(path) for path in split.filepaths]
        for number, path in enumerate(paths):
            shard = Shard(split.name, number, len(paths), [Piece(str(path), np.zeros(0, int))])
            tasks.append(shards.Task(shard, job.name, str(folder), str(folder / prepared.WORK)))
    missing = [task for task in tasks if not task.done]
    size = sum(epath.Path(task.shard.pieces[0].path).stat().length for task in missing)
    local(1)(partial(_write, job), missing, "rewriting", size)
    identity = job.embed(folder, [task.path for task in tasks]) if job.embed else None
    _finish(folder, there, tasks, job, identity)
    (folder / prepared.WORK).rmtree()
    return folder


def _begin(work: epath.Path, job: Job) -> None:
    """Creates the work folder, or checks that a run with the same settings began it."""
    begun = work / "settings.json"
    if begun.exists() and (stored := json.loads(begun.read_text())) != job.settings:
        changed = [k for k in {**stored, **job.settings} if stored.get(k) != job.settings.get(k)]
        listed = "; ".join(f"{k}={stored.get(k)} (now {job.settings.get(k)})" for k in changed)
        raise UserError(f"{work.parent} was begun with {listed}. Choose another --name")
    work.mkdir(parents=True, exist_ok=True)
    write_json(begun, job.settings)


def _write(job: Job, task: shards.Task, progress: stage.Progress) -> None:
    [piece] = task.shard.pieces
    counts: Counter[str] = Counter()
    examples: list[list[str]] = []
    with epath.Path(piece.path).open("rb") as file:
        frames = tfrecord.read_frames(file, piece.path)
        rewritten = _rewritten(frames, job, counts, examples)
        shards.write_records(task, rewritten, progress)
    write_json(task.file(".counts.json"), {"counts": counts, "examples": examples})


def _rewritten(
    frames: Iterable[bytes], job: Job, counts: Counter[str], examples: list[list[str]]
) -> Iterator[bytes]:
    """Yields the records with the model's captions, in batches of `batch_size`."""
    while batch := [tfrecord.decode(tfrecord.data_of(f)) for f in _take(frames, job.batch_size)]:
        images = [Image.open(io.BytesIO(values["image"][0])).convert("RGB") for values in batch]
        before = [values["caption"][0].decode() for values in batch]
        texts = job.rewrite(images, before)
        if len(texts) != len(batch):
            raise UserError(f"--model returned {len(texts)} captions for {len(batch)} images")
        for values, text in zip(batch, texts, strict=True):
            captions, new = _captions(values), collapse(text)
            if job.limit and new and job.limit.num_tokens(new) > job.limit.max_tokens:
                new = job.limit.truncate(new)
                counts["rewritten caption truncated"] += 1
            if new:
                captions.append(Caption(new, job.source))
            counts["rewritten" if new else "no rewritten caption"] += 1
            name = values["id"][0].decode()
            examples.append([name, captions[0].text, new])
            del examples[8:]
            record = stage.record(name, values["image"][0], captions)
            record |= {key: values[key][0] for key in ("category", "scene")}
            yield tfrecord.frame(tfrecord.encode(record))


def _captions(values: dict[str, list]) -> list[Caption]:
    texts = [value.decode() for value in values.get("captions") or values["caption"]]
    sources = [value.decode() for value in values.get("caption_sources", [])]
    return [Caption(t, s or ORIGINAL) for t, s in itertools.zip_longest(texts, sources)]


def _take(frames: Iterable[bytes], num: int) -> list[bytes]:
    return list(itertools.islice(frames, num))


def _finish(
    folder: epath.Path,
    there: epath.Path,
    tasks: list[shards.Task],
    job: Job,
    identity: dict[str, Any] | None,
) -> None:
    written = finishing.write_splits(folder, tasks)
    known = (there / prepared.MANIFEST).exists()
    source = manifest.read(there) if known else {}
    parts = [json.loads(task.file(".counts.json").read_text()) for task in tasks]
    counts = sum((Counter(part["counts"]) for part in parts), Counter())
    settings = prepared.read_metadata(there)["settings"] | {"recaption": job.settings}
    digest = manifest.digest(source) if known else None
    fields = {
        "format": finishing.FORMAT,
        "name": job.name,
        "date": job.date,
        **written,
        "sources": [{"kind": "dataset", "path": str(there), "sha256": digest}],
        "settings": settings,
        "counts": {**source.get("counts", {}), "recaption": dict(sorted(counts.items()))},
    }
    rows = [tuple(row) for row in itertools.chain(*(part["examples"] for part in parts))][:16]
    _extend_card(folder, there, job, rows)
    records = {name: split["records"] for name, split in written["splits"].items()}
    report = {"records": records, "changed": [], "skipped": []}
    finishing.finish(folder, fields, identity, report)


def _extend_card(
    folder: epath.Path, there: epath.Path, job: Job, rows: list[tuple[str, ...]]
) -> None:
    """Writes the card of the source, if it has one, followed by examples of rewritten captions."""
    title = f"Rewritten captions of {job.name}"
    note = f"The captions named {job.source} come from a model: {job.settings['model']}."
    header = ("id", "caption", job.source)
    text = [f"## {title}", "", note, "", card.line(header), card.line(["---"] * 3)]
    text += map(card.line, rows)
    before = (there / card.MARKDOWN).read_text() + "\n" if (there / card.MARKDOWN).exists() else ""
    write_text(folder / card.MARKDOWN, before + "\n".join(text) + "\n")
    parts = [html.element("h2", title), html.element("p", note), html.table(header, rows)]
    if (there / card.PAGE).exists():
        page = (there / card.PAGE).read_text().removesuffix("</html>\n")
        write_text(folder / card.PAGE, page + "".join(parts) + "</html>\n")
    else:
        write_text(folder / card.PAGE, html.page(f"Data card of {job.name}", *parts))
    (folder / "card").mkdir(exist_ok=True)
    if (there / "card").exists():
        for picture in (there / "card").iterdir():
            (folder / "card" / picture.name).write_bytes(picture.read_bytes())
