"""Encodes captions into a store; shared by encode_text and encode_text_beam."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from absl import flags
from etils import epath
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
from imagen_jax.common.errors import UserError

FLAGS = flags.FLAGS
CAPTIONS_OF_A_SHARD = 50_000


def define_flags() -> None:
    """Defines the flags shared by both commands."""
    flags.DEFINE_string("out", None, "Folder of the store; created if missing.", required=True)
    flags.DEFINE_list(
        "captions",
        [],
        "Files of captions, separated by commas: .txt (one per line), .csv or .parquet. The last "
        "part of a path may contain * and ?.",
    )
    flags.DEFINE_string("column", "caption", "Column of the captions in .csv and .parquet files.")
    flags.DEFINE_string(
        "dataset", "", "Prepared dataset in --data_dir whose captions to encode, such as scenes/64."
    )
    flags.DEFINE_string("data_dir", "data", "Folder of the prepared datasets.")
    flags.DEFINE_string(
        "encoder",
        "byte-tiny",
        "Text encoder: byte-tiny or a folder (docs/text.md). The suffix -bfloat16 keeps the "
        "weights in bfloat16, which halves their memory; -random replaces them with random ones.",
    )
    flags.DEFINE_integer(
        "max_tokens", 192, "Length limit in tokens. Longer captions are skipped.", 1
    )
    flags.DEFINE_integer(
        "fsdp", 1, "Number of devices to split the weights over, if they do not fit on one.", 1
    )
    flags.DEFINE_enum(
        "dtype",
        "bfloat16",
        list(FORMS),
        "Number format: bfloat16 is exact; int8 takes half the space, with a scale per token.",
    )
    flags.DEFINE_integer(
        "num_shards", 16, "Number of shards. Aim for 10,000 to 100,000 captions per shard.", 1
    )


def sources() -> list[Callable[[], Iterator[caption_lists.Found]]]:
    """Returns one function per file or dataset in the flags; each reads its captions.

    Raises:
      UserError: the flags name no captions, or a file does not exist.
    """
    files = caption_lists.expand(FLAGS.captions)
    reads = [partial(caption_lists.read_file, file, FLAGS.column) for file in files]
    if FLAGS.dataset:
        reads.append(partial(caption_lists.read_dataset, FLAGS.data_dir, FLAGS.dataset))
    if not reads:
        raise UserError("no captions: pass files as --captions or a dataset as --dataset")
    return reads


def load_encoder(name: str, max_tokens: int, fsdp: int):
    """Loads the encoder onto all devices of this host, which share each batch.

    Raises:
      UserError: as for text.load_encoder, or `fsdp` does not divide the number of devices.
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


def assign(
    store: Store, found: Iterable[caption_lists.Found], part: int, parts: int
) -> list[Shard]:
    """Returns the shards part, part + parts, ... of a store with their captions."""
    mine: dict[int, list[caption_lists.Found]] = {
        number: [] for number in range(part, store.num_shards, parts)
    }
    for item in found:
        number = store.shard_of(caption_key(item.caption))
        if number in mine:
            mine[number].append(item)
    return [make_shard(number, items) for number, items in mine.items()]


def encode(store: Store, shards: list[Shard], encoder) -> None:
    """Writes the shards that the store lacks, and prints the speed."""
    pending = [shard for shard in shards if not is_finished(store, shard)]
    if len(pending) < len(shards):
        done = len(shards) - len(pending)
        print(f"{done} of {len(shards)} shards already exist", file=sys.stderr)
    captions = tokens = positions = 0
    start, finished = time.perf_counter(), 0
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
            finished += len(shard.found)
            bar.update(finished - bar.n)  # adds the skipped captions
    if tokens:
        rate = tokens / (time.perf_counter() - start)
        fixed = captions * encoder.max_tokens
        print(
            f"{tokens:,} tokens at {rate:,.0f} tokens/s; {1 - tokens / positions:.0%} of the "
            f"computed positions were padding (at a fixed length of {encoder.max_tokens}: "
            f"{1 - tokens / fixed:.0%})",
            file=sys.stderr,
        )


def report(store: Store) -> None:
    """Prints the contents of a store, or how many shards are finished."""
    finished = finish(store)
    if finished is None:
        done = len(store.finished())
        print(f"{store.path}: {done} of {store.num_shards} shards are finished", file=sys.stderr)
    else:
        print(describe(store, finished), file=sys.stderr)


def encode_beside(
    path: epath.Path, read: Callable[[], Iterator[caption_lists.Found]], name: str, max_tokens: int
) -> dict[str, Any]:
    """Writes the store of a dataset's own captions, or what an interrupted run left out of it.

    Args:
      path: the store. One of another encoder is replaced.
      read: reads the captions.
      name: the encoder.

    Returns:
      The encoder's identity.
    """
    encoder = load_encoder(name, max_tokens, 1)
    num_shards = 1 + sum(1 for _ in read()) // CAPTIONS_OF_A_SHARD
    settings = (encoder.identity, "bfloat16", num_shards)
    try:
        store = create_store(str(path), *settings)
    except UserError:
        path.rmtree()
        store = create_store(str(path), *settings)
    encode(store, assign(store, read(), 0, 1), encoder)
    finish(store)
    return dict(encoder.identity)
