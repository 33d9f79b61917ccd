r"""Computes caption embeddings once and writes them to a store that training can read.

    python -m data_pipelines.encode_text --out=stores/t5-xxl --encoder=/models/t5-v1_1-xxl \
        --captions='captions/*.parquet' --column=caption --dtype=int8

Encodes every distinct caption once. After an interruption, the same command continues with the
missing shards. All devices of a host share each batch. Several hosts share the shards: start one
command per host with --shard=0/4 to --shard=3/4, or use --distributed where JAX finds the hosts.
"""

from __future__ import annotations

import itertools

from absl import flags
from tqdm import tqdm

from data_pipelines.embeddings import encoding
from data_pipelines.embeddings.store import create_store
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS
JOIN_SECONDS = 300  # time limit for all hosts to join
HEARTBEAT_SECONDS = 100  # a host silent for longer counts as dead


def define_split_flags() -> None:
    """Defines the flags that divide the work among hosts without Beam."""
    flags.DEFINE_string("shard", "", "i/n: write part i of n, counted from 0.")
    flags.DEFINE_bool("distributed", False, "Divide the work among all hosts that JAX finds.")


def parse_split(value: str) -> tuple[int, int]:
    """Parses --shard=i/n to (i, n). Without it, returns this process's index and their number.

    Raises:
      UserError: the value has another form.
    """
    if not value:
        import jax

        return jax.process_index(), jax.process_count()
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"--shard is {value!r}; allowed: i/n with i from 0 to n - 1, such as 0/4")
    return int(part), int(parts)


def main(argv: list[str]) -> None:
    del argv
    if FLAGS.distributed:
        from imagen_jax.devices import processes

        names = ("captions", "dataset", "encoder", "max_tokens", "dtype", "num_shards")
        settings = {name: FLAGS[name].value for name in names}
        job = processes.discover(JOIN_SECONDS)
        processes.join(job, settings, JOIN_SECONDS, HEARTBEAT_SECONDS)
    found = itertools.chain.from_iterable([read() for read in encoding.sources()])
    part, parts = parse_split(FLAGS.shard)
    encoder = encoding.load_encoder(FLAGS.encoder, FLAGS.max_tokens, FLAGS.fsdp)
    store = create_store(FLAGS.out, encoder.identity, FLAGS.dtype, FLAGS.num_shards)
    with tqdm(found, "reading", unit=" captions") as bar:
        shards = encoding.assign(store, bar, part, parts)
    encoding.encode(store, shards, encoder)
    encoding.report(store)


if __name__ == "__main__":
    encoding.define_flags()
    flags.adopt_module_key_flags(encoding)
    define_split_flags()
    cli.run(main)
