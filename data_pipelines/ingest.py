r"""Turns image-caption pairs in common formats into a dataset of records.

    python -m data_pipelines.ingest --source=photos --name=photos
    python -m data_pipelines.ingest --source='tars/{00000..00123}.tar' --name=laion --workers=16

Reads img2dataset's WebDataset tars, Parquet, COCO, Hugging Face image folders, folders with text
files, and lists (CSV, TSV, JSONL, JSON); docs/data.md has a table of them. Filters and converts the
images, drops duplicates, holds out a validation split, embeds the captions, and writes a manifest
and a data card. After an interruption, the same command writes what is missing.
"""

from __future__ import annotations

import os

from absl import flags

from data_pipelines.ingestion import options
from imagen_jax.common import cli

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    from data_pipelines.ingestion import jobs, run, workers  # import what --help does not need

    run.run(jobs.from_flags(), workers.local(FLAGS.workers))


if __name__ == "__main__":
    options.define_flags()
    flags.adopt_module_key_flags(options)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags.DEFINE_integer("workers", cores, "Processes that read and write (default: all cores).", 1)
    cli.run(main)
