r"""The same store as encode_text makes, byte for byte, made by a fleet with Apache Beam.

    pip install -c constraints-beam.txt -e '.[beam]'
    python -m data_pipelines.encode_text_beam --out=/shared/store --encoder=/shared/t5-v1_1-xxl \
        --captions='/shared/lists/*.parquet' --num_shards=4096 \
        --beam_options=runner=FlinkRunner,flink_master=...

Each file is read by one worker, and each shard encoded and written by one. Started again, it goes
on with the shards that are missing. Workers need this package, and see the same paths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import apache_beam as beam
from absl import flags
from apache_beam.options.pipeline_options import PipelineOptions

from data_pipelines import encode_text
from data_pipelines.common import caption_key
from data_pipelines.embeddings.caption_lists import Found
from data_pipelines.embeddings.shards import is_finished, make_shard, write_shard
from data_pipelines.embeddings.store import Store, create_store
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS


class WriteShard(beam.DoFn):
    """(a shard's number, its captions as they were found) -> nothing but the shard's files.

    Args:
      encoder_args: of encode_text.load_encoder.
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
            self._encoder = encode_text.load_encoder(*self._encoder_args)
            if self._encoder.identity != self._store.text_identity:
                raise UserError(
                    f"the encoder of this worker is {self._encoder.identity}; the store is of "
                    f"{self._store.text_identity}"
                )
        write_shard(self._store, shard, self._encoder)


def build(
    pipeline: beam.Pipeline,
    store: Store,
    reads: Sequence[Callable[[], Iterator[Found]]],
    encoder_args: tuple[str, int, int],
) -> None:
    """Adds the steps that read captions, bring those of a shard together, and write the shards.

    Args:
      reads: what reads the captions, one call for each file.
      encoder_args: of encode_text.load_encoder.
    """

    def keyed(found: Found) -> tuple[int, Found]:
        return store.shard_of(caption_key(found.caption)), found

    # A shard without a caption is written too.
    shards = pipeline | "Shards" >> beam.Create([(n, None) for n in range(store.num_shards)])
    files = pipeline | "Files" >> beam.Create(reads) | "Spread" >> beam.Reshuffle()
    captions = files | "Read" >> beam.FlatMap(lambda read: read()) | "Key" >> beam.Map(keyed)
    grouped = (shards, captions) | beam.Flatten() | beam.GroupByKey()
    grouped | "Write" >> beam.ParDo(WriteShard(store, encoder_args))


def main(argv: list[str]) -> None:
    del argv
    from imagen_jax.text import encoder_identity  # imports JAX, which --help does not need

    reads = encode_text.sources()
    identity = encoder_identity(FLAGS.encoder, FLAGS.max_tokens)
    if identity is None:
        raise UserError(f"--encoder is {FLAGS.encoder!r}; there is no such encoder here")
    store = create_store(FLAGS.out, identity, FLAGS.dtype, FLAGS.num_shards)
    options = PipelineOptions([f"--{option}" for option in FLAGS.beam_options])
    with beam.Pipeline(options=options) as pipeline:
        build(pipeline, store, reads, (FLAGS.encoder, FLAGS.max_tokens, FLAGS.fsdp))
    encode_text.report(store)


if __name__ == "__main__":
    # Workers find what is defined in the module by its name, which __main__ is not.
    from data_pipelines import encode_text_beam

    encode_text.define_flags()
    flags.DEFINE_list("beam_options", [], "Options of Beam as name=value, such as runner=...")
    cli.run(encode_text_beam.main)
