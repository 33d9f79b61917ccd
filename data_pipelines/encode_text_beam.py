r"""Writes the same store as encode_text, byte for byte, on a fleet with Apache Beam.

    pip install -c constraints-beam.txt -e '.[beam]'
    python -m data_pipelines.encode_text_beam --out=/shared/store --encoder=/shared/t5-v1_1-xxl \
        --captions='/shared/lists/*.parquet' --num_shards=4096 \
        --beam_options=runner=FlinkRunner,flink_master=...

One worker reads each file, and one worker encodes and writes each shard. After an interruption, the
same command continues with the missing shards. Workers need this package and must see the same
paths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

from absl import flags

from data_pipelines.common import NO_BEAM, caption_key
from data_pipelines.embeddings import encoding
from data_pipelines.embeddings.caption_lists import Found
from data_pipelines.embeddings.shards import is_finished, make_shard, write_shard
from data_pipelines.embeddings.store import Store, create_store
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS


@functools.cache
def _encoder(name: str, max_tokens: int, fsdp: int):
    """Loads the encoder once in each worker process."""
    return encoding.load_encoder(name, max_tokens, fsdp)


def write(
    element: tuple[int, Iterable[Found | None]], store: Store, encoder_args: tuple[str, int, int]
) -> None:
    """Writes the files of one shard, given its number and captions.

    Args:
      encoder_args: arguments of encoding.load_encoder.
    """
    number, found = element
    shard = make_shard(number, filter(None, found))
    if is_finished(store, shard):
        return
    encoder = _encoder(*encoder_args)
    if encoder.identity != store.text_identity:
        raise UserError(
            f"the encoder on this worker is {encoder.identity}; the store has embeddings of "
            f"{store.text_identity}"
        )
    write_shard(store, shard, encoder)


def build(
    pipeline,
    store: Store,
    reads: Sequence[Callable[[], Iterator[Found]]],
    encoder_args: tuple[str, int, int],
) -> None:
    """Adds the steps that read captions, group them by shard, and write the shards.

    Args:
      pipeline: a beam.Pipeline.
      reads: functions that read the captions, one per file.
      encoder_args: arguments of encoding.load_encoder.
    """
    import apache_beam as beam

    def keyed(found: Found) -> tuple[int, Found]:
        return store.shard_of(caption_key(found.caption)), found

    # These entries make Beam write shards without captions too.
    shards = pipeline | "Shards" >> beam.Create([(n, None) for n in range(store.num_shards)])
    files = pipeline | "Files" >> beam.Create(reads) | "Spread" >> beam.Reshuffle()
    captions = files | "Read" >> beam.FlatMap(lambda read: read()) | "Key" >> beam.Map(keyed)
    grouped = (shards, captions) | beam.Flatten() | beam.GroupByKey()
    grouped | "Write" >> beam.Map(write, store, encoder_args)


def main(argv: list[str]) -> None:
    del argv
    try:  # --help does not need these
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as e:
        raise UserError(NO_BEAM) from e
    from imagen_jax.text import encoder_identity

    reads = encoding.sources()
    identity = encoder_identity(FLAGS.encoder, FLAGS.max_tokens)
    if identity is None:
        raise UserError(
            f"--encoder is {FLAGS.encoder!r}, which is not a folder here and not bundled; nothing "
            "is downloaded, see docs/text.md"
        )
    store = create_store(FLAGS.out, identity, FLAGS.dtype, FLAGS.num_shards)
    options = PipelineOptions([f"--{option}" for option in FLAGS.beam_options])
    with beam.Pipeline(options=options) as pipeline:
        build(pipeline, store, reads, (FLAGS.encoder, FLAGS.max_tokens, FLAGS.fsdp))
    encoding.report(store)


if __name__ == "__main__":
    # Import by name, because workers cannot find definitions in __main__.
    from data_pipelines import encode_text_beam

    encoding.define_flags()
    flags.adopt_module_key_flags(encoding)
    flags.DEFINE_list("beam_options", [], "Beam options as name=value, such as runner=FlinkRunner.")
    cli.run(encode_text_beam.main)
