"""Writes the shards of a store, on one machine, on several hosts or in a Beam pipeline."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from data_pipelines.common import Skip, caption_key, summary
from data_pipelines.embeddings.caption_lists import Found
from data_pipelines.embeddings.store import FORMS, INDEX, Store
from data_pipelines.records import tfrecord
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import replacing, write_json

REPORT = "report.json"

# Called with (captions done, their tokens, positions computed).
Progress = Callable[[int, int, int], None]


class Shard(NamedTuple):
    """The distinct captions of a shard, sorted by key, each with its first location."""

    number: int
    found: dict[bytes, Found]

    @property
    def digest(self) -> str:
        """Hash of the captions, to tell whether an existing shard holds the same ones."""
        return hashlib.sha256(b"".join(self.found)).hexdigest()


def make_shard(number: int, found: Iterable[Found]) -> Shard:
    """Builds a shard from captions in any order; duplicates are allowed."""
    first: dict[bytes, Found] = {}
    for item in found:
        key = caption_key(item.caption)
        first[key] = min(first.get(key, item), item)
    return Shard(number, dict(sorted(first.items())))


def is_finished(store: Store, shard: Shard) -> bool:
    """Returns whether the store already has the shard with the same captions."""
    report = store.report(shard.number)
    return report is not None and report["captions_sha256"] == shard.digest


def write_shard(store: Store, shard: Shard, encoder, progress: Progress | None = None) -> None:
    """Encodes the captions of a shard and writes it. A shard becomes visible only when complete.

    Skips captions that cannot be encoded and lists them in the shard's report.

    Args:
      encoder: the TextEncoder with the identity of the store.

    Raises:
      UserError: an embedding is not finite.
    """
    captions, skipped = _usable(shard, encoder)
    store.file(shard.number, ".json").unlink(missing_ok=True)
    similarity = {name: [np.ones(0)] for name in FORMS}
    index = []
    with _record_writer(store.file(shard.number, ".tfrecord")) as write:
        for batch in encoder.batches(captions):
            for caption, embedding in batch.embeddings.items():
                if not np.isfinite(embedding.astype(np.float32)).all():
                    raise UserError(f"the embedding of caption {caption!r} is not finite")
                for name, form in FORMS.items():
                    packed = form.pack(embedding)
                    unpacked = form.unpack(packed, store.dim)
                    similarity[name].append(cosines(embedding, unpacked))
                    if name == store.dtype:
                        index.append((captions[caption], write(packed), len(embedding)))
            if progress:
                tokens = sum(map(len, batch.embeddings.values()))
                progress(len(batch.embeddings), tokens, batch.positions)
    with replacing(store.file(shard.number, ".npy")) as temporary, temporary.open("wb") as file:
        np.save(file, np.array(sorted(index), INDEX))
    report = {
        "captions": len(index),
        "tokens": sum(tokens for _, _, tokens in index),
        "cosine_sum": {k: np.concatenate(v).sum() for k, v in similarity.items()},
        "cosine_min": {k: np.concatenate(v).min(initial=1) for k, v in similarity.items()},
        "captions_sha256": shard.digest,
        "skipped": [skip._asdict() for skip in skipped],
    }
    write_json(store.file(shard.number, ".json"), report)


@contextlib.contextmanager
def _record_writer(path: epath.Path) -> Iterator[Callable[[bytes], int]]:
    """Yields a function that appends a record and returns the byte at which it starts."""
    with cli.quiet_imports():  # slow; not needed if all shards are finished
        from tensorflow import io as tf_io

    size = 0

    def write(data: bytes) -> int:
        nonlocal size
        writer.write(data)
        start, size = size, size + len(data) + tfrecord.FRAME
        return start

    with replacing(path) as temporary, tf_io.TFRecordWriter(str(temporary)) as writer:
        yield write


def _usable(shard: Shard, encoder) -> tuple[dict[str, bytes], list[Skip]]:
    """Splits captions into those that can be encoded, with their keys, and the others."""
    usable, skipped = {}, []
    for key, (source, number, caption) in shard.found.items():
        printable = caption.encode("utf-8", errors="replace").decode()
        if printable != caption:
            reason, detail = "caption not UTF-8", printable[:100]
        elif not caption.strip():
            reason, detail = "empty caption", ""
        elif (tokens := encoder.num_tokens(caption)) > encoder.max_tokens:
            reason, detail = f"caption longer than {encoder.max_tokens} tokens", f"{tokens} tokens"
        else:
            usable[caption] = key
            continue
        skipped.append(Skip(f"{source}:{number}", reason, detail))
    return usable, skipped


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns the cosine similarity of two embeddings [n, dim] per token: float64 [n]."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(norms > 0, (a * b).sum(1) / np.where(norms > 0, norms, 1), 1.0)


def finish(store: Store) -> dict[str, Any] | None:
    """Writes the store's report and removes temporary files, once all shards are finished.

    Returns:
      The report, or None if shards are missing.
    """
    reports = [store.report(shard) for shard in range(store.num_shards)]
    if None in reports:
        return None
    for path in store.path.glob(".shard-*.tmp"):
        path.unlink(missing_ok=True)
    tokens = sum(report["tokens"] for report in reports)
    captions = sum(report["captions"] for report in reports)
    framing = tfrecord.FRAME + INDEX.itemsize
    report = {
        "captions": captions,
        "tokens": tokens,
        "forms": {
            name: {
                "bytes_per_million_captions": round(
                    1e6 * (tokens * form.token_bytes(store.dim) / max(captions, 1) + framing)
                ),
                "cosine_mean": sum(r["cosine_sum"][name] for r in reports) / max(tokens, 1),
                "cosine_min": min(r["cosine_min"][name] for r in reports),
            }
            for name, form in FORMS.items()
        },
        "skipped": [skip for r in reports for skip in r["skipped"]],
    }
    write_json(store.path / REPORT, report)
    return report


def describe(store: Store, report: Mapping[str, Any]) -> str:
    """Describes a finished store in a few lines: its size and accuracy in each form."""
    lines = [
        f"{store.path}: {report['captions']:,} captions, {report['tokens']:,} tokens, "
        f"stored as {store.dtype}"
    ]
    for name, form in report["forms"].items():
        lines.append(
            f"  {name:8}  {form['bytes_per_million_captions'] / 2**30:8.2f} GiB per million "
            f"captions, cosine similarity {form['cosine_mean']:.6f}, min {form['cosine_min']:.6f}"
        )
    if skipped := [Skip(**skip) for skip in report["skipped"]]:
        lines.append(f"skipped {len(skipped)}: {summary(skipped)}; listed in {store.path / REPORT}")
    return "\n".join(lines)
