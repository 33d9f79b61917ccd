r"""Writes the same dataset as ingest, byte for byte, on a fleet with Apache Beam.

    pip install -c constraints-beam.txt -e '.[beam]'
    python -m data_pipelines.ingest_beam --source='gs://bucket/tars/*.tar' --name=laion \
        --data_dir=gs://bucket/data --encoder= --beam_options=runner=DataflowRunner,project=...

One worker reads each part of a source, and one worker writes each shard. After an interruption, the
same command writes what is missing. Workers need this package and must see the same paths. With an
encoder, this command itself embeds the captions in the end; encode_text_beam does it on the fleet.
"""

from __future__ import annotations

from absl import flags

from data_pipelines.ingestion import options
from imagen_jax.common import cli

FLAGS = flags.FLAGS


def main(argv: list[str]) -> None:
    del argv
    from data_pipelines.ingestion import workers

    each = workers.beam(FLAGS.beam_options)  # before other imports, which take longer
    from data_pipelines.ingestion import jobs, run

    run.run(jobs.from_flags(), each)


if __name__ == "__main__":
    options.define_flags()
    flags.adopt_module_key_flags(options)
    flags.DEFINE_list("beam_options", [], "Beam options as name=value, such as runner=FlinkRunner.")
    cli.run(main)
