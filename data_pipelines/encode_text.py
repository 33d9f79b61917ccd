r"""Computes the embeddings of captions once, and keeps them in a store that training can read.

    python -m data_pipelines.encode_text --out=stores/t5-xxl --encoder=/models/t5-v1_1-xxl \
        --captions='captions/*.parquet' --column=caption --dtype=int8

Every distinct caption is encoded once. Killed and started again, it goes on with the shards that
are missing. All devices of this host share each batch; several hosts share the shards, with
--shard=0/4 to --shard=3/4 or as the processes of JAX that --distributed finds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial

from absl import flags
from tqdm import tqdm

from data_pipelines.common import caption_key
from data_pipelines.embeddings import caption_lists
from data_pipelines.embeddings.shards import (
    Shard,
    describe,
    finish,
    is_finished,
    make_shard,
    write_shard,
)
from data_pipelines.embeddings.store import FORMS, Store, create_store
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS
# For the other hosts to come, and after which a silent one is taken for dead.
JOIN_SECONDS, HEARTBEAT_SECONDS = 300, 100


def define_flags() -> None:
    """The flags that this and the Beam pipeline have."""
    flags.DEFINE_string("out", None, "Folder of the store.", required=True)
    flags.DEFINE_list(
        "captions", [], "Files with captions: .txt with one a line, .csv, .parquet; * is allowed."
    )
    flags.DEFINE_string("column", "caption", "Where captions are in CSV and Parquet.")
    flags.DEFINE_string("dataset", "", "A prepared dataset in --data_dir, such as scenes/64.")
    flags.DEFINE_string("data_dir", "data", "Folder of the datasets.")
    flags.DEFINE_string(
        "encoder",
        "byte-tiny",
        "Text encoder: a bundled one's name, or a folder with its weights. With -bfloat16 after it "
        "weights are kept in bfloat16, which takes half of the memory; with -random they are not "
        "read but random.",
    )
    flags.DEFINE_integer("max_tokens", 192, "The longest caption, in tokens, that is encoded.", 1)
    flags.DEFINE_integer(
        "fsdp", 1, "Split the weights over this many devices, if they do not fit on one.", 1
    )
    flags.DEFINE_enum("dtype", "bfloat16", list(FORMS), "int8 has a scale for each token.")
    flags.DEFINE_integer(
        "num_shards", 16, "Files that the store has: as many as hold 10,000 to 100,000 captions.", 1
    )


def define_split_flags() -> None:
    """The flags by which hosts share the work without Beam."""
    flags.DEFINE_string("shard", "", "i/n: this is host i of n, counted from 0.")
    flags.DEFINE_bool("distributed", False, "Several hosts that JAX can find by itself.")


def sources() -> list[Callable[[], Iterator[caption_lists.Found]]]:
    """What reads the captions that the flags name, one call for each file.

    Raises:
      UserError: no captions are named, or a file is not there.
    """
    files = caption_lists.expand(FLAGS.captions)
    reads = [partial(caption_lists.read_file, file, FLAGS.column) for file in files]
    if FLAGS.dataset:
        reads.append(partial(caption_lists.read_dataset, FLAGS.data_dir, FLAGS.dataset))
    if not reads:
        raise UserError("no captions; name files with --captions or a dataset with --dataset")
    return reads


def load_encoder(name: str, max_tokens: int, fsdp: int):
    """The encoder on all devices of this host, which share each batch.

    Raises:
      UserError: as text.load_encoder; or the devices cannot be grouped by `fsdp`.
    """
    import jax

    from imagen_jax import text
    from imagen_jax.devices import sharding

    devices = jax.local_devices()
    if len(devices) % fsdp:
        raise UserError(f"--fsdp is {fsdp}; it must divide this host's {len(devices)} device(s)")
    mesh = sharding.make_mesh(sharding.MeshConfig(fsdp=fsdp), devices)
    return text.load_encoder(
        name,
        max_tokens,
        place=partial(sharding.weight_shardings, mesh),
        put=partial(sharding.put_batch, mesh),
        ways=sharding.batch_ways(mesh),
    )


def parse_split(value: str) -> tuple[int, int]:
    """--shard=i/n as numbers; without it, this process among JAX's.

    Raises:
      UserError: it is something else.
    """
    if not value:
        import jax

        return jax.process_index(), jax.process_count()
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise UserError(f"--shard is {value!r}; allowed: i/n with i from 0 to n - 1, such as 0/4")
    return int(part), int(parts)


def assign(
    store: Store, found: Iterable[caption_lists.Found], part: int, parts: int
) -> list[Shard]:
    """The shards part, part + parts, ... of a store, with their captions."""
    mine: dict[int, list[caption_lists.Found]] = {
        number: [] for number in range(part, store.num_shards, parts)
    }
    for item in found:
        number = store.shard_of(caption_key(item.caption))
        if number in mine:
            mine[number].append(item)
    return [make_shard(number, items) for number, items in mine.items()]


def encode(store: Store, shards: list[Shard], encoder) -> None:
    """Writes the shards that are not in the store yet, and says how fast that went."""
    pending = [shard for shard in shards if not is_finished(store, shard)]
    if len(pending) < len(shards):
        print(f"{len(shards) - len(pending)} of {len(shards)} shards were there", file=sys.stderr)
    captions = tokens = positions = 0
    start, looked_at = time.perf_counter(), 0
    total = sum(len(shard.found) for shard in pending)
    with tqdm(total=total, unit=" captions", mininterval=0.5) as bar:

        def progress(*counts: int) -> None:
            nonlocal captions, tokens, positions
            captions, tokens, positions = (
                a + b for a, b in zip((captions, tokens, positions), counts, strict=True)
            )
            bar.update(counts[0])

        for shard in pending:
            bar.set_postfix_str(f"shard {shard.number} of {store.num_shards}", refresh=False)
            write_shard(store, shard, encoder, progress)
            looked_at += len(shard.found)
            bar.update(looked_at - bar.n)  # those skipped
    if tokens:
        rate = tokens / (time.perf_counter() - start)
        fixed = captions * encoder.max_tokens
        print(
            f"{tokens:,} tokens, {rate:,.0f} a second; padding {1 - tokens / positions:.0%} of "
            f"what was computed ({1 - tokens / fixed:.0%} at the one length {encoder.max_tokens})",
            file=sys.stderr,
        )


def main(argv: list[str]) -> None:
    del argv
    if FLAGS.distributed:
        from imagen_jax.devices import processes

        names = ("captions", "dataset", "encoder", "max_tokens", "dtype", "num_shards")
        settings = {name: FLAGS[name].value for name in names}
        job = processes.discover(JOIN_SECONDS)
        processes.join(job, settings, JOIN_SECONDS, HEARTBEAT_SECONDS)
    reads = sources()
    part, parts = parse_split(FLAGS.shard)
    encoder = load_encoder(FLAGS.encoder, FLAGS.max_tokens, FLAGS.fsdp)
    store = create_store(FLAGS.out, encoder.identity, FLAGS.dtype, FLAGS.num_shards)
    found = tqdm((item for read in reads for item in read()), "reading", unit=" captions")
    encode(store, assign(store, found, part, parts), encoder)
    report(store)


def report(store: Store) -> None:
    """Says what is in a store, or how much of it is still missing."""
    finished = finish(store)
    if finished is None:
        done = len(store.finished())
        print(f"{store.path}: {done} of {store.num_shards} shards are there", file=sys.stderr)
    else:
        print(describe(store, finished), file=sys.stderr)


if __name__ == "__main__":
    define_flags()
    define_split_flags()
    cli.run(main)
