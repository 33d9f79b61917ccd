"""Makes a dataset of finished shards: indices, tfds's metadata, the report and the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from etils import epath

from data_pipelines.ingestion import shards
from data_pipelines.records import dataset, manifest, prepared
from imagen_jax.common.files import write_json

FORMAT = 1  # of the manifest


def write_splits(folder: epath.Path, tasks: Sequence[shards.Task]) -> dict[str, Any]:
    """Writes tfds's metadata.

    Returns:
      The fields `splits`, `captions` and `schema` of the manifest.
    """
    splits: dict[str, dict[str, Any]] = {}
    summaries = [task.summary() for task in tasks]
    most = max(summary["most_captions"] for summary in summaries)
    sources = sum((Counter(summary["caption_sources"]) for summary in summaries), Counter())
    features = dataset.features(several=most > 1, named=bool(sources))
    for split in dict.fromkeys(task.shard.split for task in tasks):
        listed = [
            {key: summary[key] for key in ("file", "records", "bytes", "sha256")}
            for task, summary in zip(tasks, summaries, strict=True)
            if task.shard.split == split
        ]
        total = {key: sum(shard[key] for shard in listed) for key in ("records", "bytes")}
        splits[split] = {**total, "shards": listed}
    dataset.write_tfds_metadata(folder, tasks[0].name, features, splits)
    captions = sum(summary["captions"] for summary in summaries)
    return {
        "splits": splits,
        "captions": {
            "total": captions,
            "most_of_an_image": most,
            "sources": dict(sorted(sources.items())),
        },
        "schema": {name: type(feature).__name__ for name, feature in sorted(features.items())},
    }


def finish(
    folder: epath.Path,
    fields: dict[str, Any],
    text_identity: dict[str, Any] | None,
    report: dict[str, Any],
) -> None:
    """Writes the metadata, the report and, last, the manifest with `fields`."""
    metadata = {"text_identity": text_identity, "settings": fields["settings"]}
    write_json(folder / prepared.METADATA, metadata)
    write_json(folder / dataset.REPORT, report)
    manifest.write(folder, fields)
