"""What the flags of ingest and ingest_beam ask for."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from absl import flags
from etils import epath

from data_pipelines.embeddings import caption_lists, encoding
from data_pipelines.ingestion import options, run
from data_pipelines.records import prepared

FLAGS = flags.FLAGS


def from_flags() -> run.Job:
    """Returns the job that the flags describe."""
    settings = options.from_flags()
    return run.Job(
        specs=FLAGS.source,
        data_dir=FLAGS.data_dir,
        name=FLAGS.name,
        options=settings,
        columns=options.columns_from_flags(),
        embed=embedding(settings.encoder, settings.max_tokens),
        overwrite=FLAGS.overwrite,
        skip_damaged=FLAGS.skip_damaged,
        date=options.today(),
    )


def embedding(encoder: str, max_tokens: int) -> run.Embed | None:
    """Returns a function that embeds the captions of shards into a store beside them."""

    def embed(folder: epath.Path, files: Sequence[epath.Path]) -> dict[str, Any]:
        read = partial(caption_lists.read_records, files)
        return encoding.encode_beside(folder / prepared.STORE, read, encoder, max_tokens)

    return embed if encoder else None
