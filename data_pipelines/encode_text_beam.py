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

from collections.abc import Callable, Iterable, Iterator, Sequence

import apache_beam as beam
from absl import flags
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines.common import caption_key
from data_pipelines.embeddings import encoding
from data_pipelines.embeddings.caption_lists import Found
from data_pipelines.embeddings.shards import is_finished, make_shard, write_shard
from data_pipelines.embeddings.store import Store, create_store
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS


class WriteShard(beam.DoFn):
    """Writes the files of one shard, given its number and captions.

    Args:
      encoder_args: arguments of encoding.load_encoder.
    """

    def __init__(self, store: Store, encoder_args: tuple[str, int, int]):
        self._store, self._encoder_args = store, encoder_args
        self._encoder = None

    def process(self, element: tuple[int, Iterable[Found | None]]) -> None:
        number, found = element
        shard = make_shard(number, filter(None, found))
        if is_finished(self._store, shard):
            return
        if self._encoder is None:
            self._encoder = encoding.load_encoder(*self._encoder_args)
            if self._encoder.identity != self._store.text_identity:
                raise UserError(
                    f"the encoder on this worker is {self._encoder.identity}; the store has "
                    f"embeddings of {self._store.text_identity}"
                )
        write_shard(self._store, shard, self._encoder)


def build(
    pipeline: beam.Pipeline,
    store: Store,
    reads: Sequence[Callable[[], Iterator[Found]]],
    encoder_args: tuple[str, int, int],
) -> None:
    """Adds the steps that read captions, group them by shard, and write the shards.

    Args:
      reads: functions that read the captions, one per file.
      encoder_args: arguments of encoding.load_encoder.
    """

    def keyed(found: Found) -> tuple[int, Found]:
        return store.shard_of(caption_key(found.caption)), found

    # These entries make Beam write shards without captions too.
    shards = pipeline | "Shards" >> beam.Create([(n, None) for n in range(store.num_shards)])
    files = pipeline | "Files" >> beam.Create(reads) | "Spread" >> beam.Reshuffle()
    captions = files | "Read" >> beam.FlatMap(lambda read: read()) | "Key" >> beam.Map(keyed)
    grouped = (shards, captions) | beam.Flatten() | beam.GroupByKey()
    grouped | "Write" >> beam.ParDo(WriteShard(store, encoder_args))


def main(argv: list[str]) -> None:
    del argv
    from imagen_jax.text import encoder_identity  # imports JAX, which --help does not need

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
