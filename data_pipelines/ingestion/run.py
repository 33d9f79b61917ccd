"""From sources to a finished dataset, by steps that can be repeated after an interruption.

1. List the sources and divide them into parts.
2. Stage every part: its records and a summary, in .ingest below the dataset's folder.
3. Drop duplicates, draw the validation split, and write the shards.
4. Embed the captions, if there is an encoder, into a store beside the shards.
5. Write the indices, the report, the data card and the manifest; delete .ingest.

Steps 2 to 4 skip what exists. The dataset appears with step 5.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from etils import epath

from data_pipelines.common import listed
from data_pipelines.ingestion import (
    card,
    filters,
    finishing,
    layout,
    options,
    shards,
    sources,
    stage,
    summary,
)
from data_pipelines.ingestion.items import Columns, Source
from data_pipelines.ingestion.workers import Each, one_line
from data_pipelines.records import dataset, manifest, prepared
from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError

# Embeds the captions of the shards in a folder: (folder, shard files) -> identity of the encoder.
Embed = Callable[[epath.Path, Sequence[epath.Path]], dict[str, Any]]


class Job(NamedTuple):
    """What to make.

    Attributes:
      specs: of the sources.
      data_dir, name: where the dataset goes.
      embed: None for a dataset without embeddings.
      date: for the manifest.
    """

    specs: Sequence[str]
    data_dir: str
    name: str
    options: options.Options
    columns: Columns = Columns()
    embed: Embed | None = None
    overwrite: bool = False
    skip_damaged: bool = False
    date: str = ""


def run(job: Job, each: Each) -> epath.Path:
    """Makes the dataset, or finishes one that was interrupted; returns its folder.

    Raises:
      UserError: a source cannot be used, no image passes, the disk is full, or a dataset of other
        sources or settings exists and `overwrite` is not set.
    """
    with one_line():
        return _run(job, each)


def _run(job: Job, each: Each) -> epath.Path:
    filters.check_languages(job.options.languages)
    filters.check_detector(job.options)
    found = [sources.find(spec, job.columns, job.options.shard_size) for spec in job.specs]
    filters.token_limit(job.options.encoder, job.options.max_tokens)  # fails early
    buckets.check(job.data_dir)
    path = epath.Path(job.data_dir) / job.name / prepared.VERSION
    described = {
        "sources": [_describe(source) for source in found],
        "settings": {k: _plain(v) for k, v in dataclasses.asdict(job.options).items()},
    }
    whole = (path / prepared.MANIFEST).exists() or not (path / prepared.WORK).exists()
    exists = (path / prepared.INFO).exists() and whole
    if exists and not job.overwrite:
        _check_same(path, described)
        _clean(path)
        print(f"{path} is already prepared with these settings", file=sys.stderr)
        return path
    folder = path.with_name(f"{path.name}.new") if exists else path
    try:
        (folder / prepared.WORK).mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"--data_dir={job.data_dir} cannot be written: {e.strerror}") from e
    staged = _stage(job, found, folder / prepared.WORK, each)
    _write(job, found, staged, folder, described, each)
    _clean(folder)
    if exists:
        old = path.with_name(f"{path.name}.replaced")
        path.rename(old)
        folder.rename(path)
        old.rmtree()
    return path


def _stage(job: Job, found: Sequence[Source], work: epath.Path, each: Each) -> list[stage.Task]:
    tasks = []
    for number, source in enumerate(found):
        prefix = f"{number}/" if len(found) > 1 else ""
        for part in source.parts:
            args = (part, prefix, job.options, str(work), job.skip_damaged)
            tasks.append(stage.Task(*args))
    missing = [task for task in tasks if not task.done]
    if len(missing) < len(tasks):
        done = len(tasks) - len(missing)
        print(f"{done} of {len(tasks)} parts are already read", file=sys.stderr)
    each(stage.stage, missing, "reading", sum(task.part.bytes for task in missing))
    return tasks


def _write(
    job: Job,
    found: Sequence[Source],
    staged: Sequence[stage.Task],
    folder: epath.Path,
    described: dict[str, Any],
    each: Each,
) -> None:
    total = summary.merge(task.summary() for task in staged)
    for source in found:
        for skip in source.skipped:
            total.items += 1
            total.add("rejected", skip, summary.REPORTED)
    if not total.accepted:
        reasons = listed(total.counts["rejected"].most_common()) or "there is none"
        raise UserError(f"no image of {', '.join(job.specs)} passes: {reasons}")
    planned = layout.plan(staged, job.options)
    total.counts["rejected"].update(planned.dropped)
    total.entries["rejected"] += planned.entries
    args = (job.name, str(folder), str(folder / prepared.WORK))
    tasks = [shards.Task(shard, *args) for shard in planned.shards]
    missing = [task for task in tasks if not task.done]
    size = sum(task.file(".tfrecord").stat().length for task in staged)
    each(shards.write, missing, "writing", size * len(missing) // max(1, len(tasks)))
    wanted = {path for task in tasks for path in (task.path, task.offsets_path)}
    for stale in folder.glob("*.tfrecord-*"):  # of a run with other settings
        if stale not in wanted:
            stale.unlink()
    identity = job.embed(folder, [task.path for task in tasks]) if job.embed else None
    written = finishing.write_splits(folder, tasks)
    fields = {
        "format": finishing.FORMAT,
        "name": job.name,
        "date": job.date,
        **written,
        **described,
        "counts": _counts(total, sum(s["records"] for s in written["splits"].values())),
        "histograms": {k: dict(sorted(v.items())) for k, v in total.histograms.items()},
    }
    card.write(folder, fields, total, planned)
    entries = {
        what: [skip._asdict() for skip in total.entries[of]]
        for what, of in (("changed", "changed"), ("skipped", "rejected"))
    }
    records = {name: split["records"] for name, split in written["splits"].items()}
    finishing.finish(folder, fields, identity, {"records": records, **entries})
    _print(folder, fields)


def _clean(folder: epath.Path) -> None:
    """Deletes the unfinished parts, and temporary files of processes that were killed."""
    if (folder / prepared.WORK).exists():
        (folder / prepared.WORK).rmtree()
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()


def _describe(source: Source) -> dict[str, Any]:
    digest = hashlib.sha256("\n".join(part.fingerprint for part in source.parts).encode())
    return {
        "kind": source.kind,
        "path": source.path,
        "parts": len(source.parts),
        "bytes": sum(part.bytes for part in source.parts),
        "sha256": digest.hexdigest(),
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_same(path: epath.Path, described: dict[str, Any]) -> None:
    """Raises a UserError unless the dataset at `path` is whole and has these sources, settings."""
    if not (path / prepared.MANIFEST).exists():
        raise UserError(f"{path} was not made by ingest; --overwrite replaces it")
    there = manifest.read(path)
    differing = []
    for key, value in described["settings"].items():
        # A manifest from before an option existed was made with its default.
        default = _plain(getattr(options.Options, key))
        if (stored := there["settings"].get(key, default)) != value:
            differing.append(f"{key}={stored} (now {value})")
    old, new = (
        ", ".join(f"{s['kind']} {s['sha256'][:8]}" for s in fields["sources"])
        for fields in (there, described)
    )
    if old != new:
        differing.append(f"source={old} (now {new})")
    if differing:
        raise UserError(
            f"{path} was prepared with {'; '.join(differing)}. Choose another --name or "
            "--data_dir, or --overwrite to replace it"
        )


def _counts(total: summary.Summary, records: int) -> dict[str, Any]:
    ranked = {
        what: dict(sorted(total.counts[what].items(), key=lambda pair: (-pair[1], pair[0])))
        for what in ("rejected", "changed")
    }
    return {
        "candidates": total.items,
        "accepted": total.accepted,
        "records": records,
        **ranked,
        "scores": dict(sorted(total.histograms.get("score", {}).items())),
        "unknown_license": total.histograms["license"]["unknown"],
    }


def _print(folder: epath.Path, fields: dict[str, Any]) -> None:
    splits = fields["splits"]
    taken = listed((name, split["records"]) for name, split in splits.items())
    size = sum(split["bytes"] for split in splits.values()) / 2**20
    print(f"wrote {folder}: {taken} ({size:.1f} MiB)", file=sys.stderr)
    for what, word in (("changed", "changed"), ("rejected", "skipped")):
        if counts := fields["counts"][what]:
            print(f"{word} {sum(counts.values())}: {listed(counts.items())}", file=sys.stderr)
    print(f"see {folder / card.MARKDOWN} and {folder / dataset.REPORT}", file=sys.stderr)
