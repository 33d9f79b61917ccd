"""The SeqIO tasks and their source, which reads records by index in a computed order.

A task yields

  id, caption, category, scene   strings
  image                          uint8 [H, W, 3]
  text_embeddings                bfloat16 [n, dim], not padded
  text_embeddings_1, ...         the same from the other stores of embeddings, if there are several
  position                       int64, the global position in the stream

Its source is replaced by one at the data's directory:

    task = seqio.get_mixture_or_task("scenes_32")
    task = task.replace(source=task.source.at(data_dir="data", start=0))
    task.get_dataset(split="train", shuffle=True, seed=0, num_epochs=1, try_in_mem_cache=False)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import seqio
import tensorflow as tf
import tensorflow_datasets as tfds

from data_pipelines.embeddings.store import Store, open_store
from data_pipelines.reading import check
from data_pipelines.records import dataset
from imagen_jax.common.errors import UserError

# Positions computed at once. Computing a single one takes as long as parsing its record.
_POSITIONS = 64


def names() -> list[str]:
    """Returns the names of the tasks that this module registers."""
    return list(check.TASKS)


def embedding_keys(num: int) -> list[str]:
    """Returns the features with the embeddings of `num` encoders."""
    return ["text_embeddings", *(f"text_embeddings_{i}" for i in range(1, num))]


class RecordsSource(seqio.DataSource):
    """Reads records in a computed order, so the position in the data is one integer.

    Global positions count up from 0. Shuffled, the stream is endless: position g is record
    perm(g % n), where each epoch g // n has its own permutation. In order, position g is record g,
    and the stream ends after one pass. Shards take blocks of positions in turn, so together they
    read the same records whatever their number and the block size.

    Args:
      name: the dataset, such as "scenes/32".
      data_dir: directory of the datasets.
      start: the first global position; a resumed run passes its saved one.
      block: consecutive positions that a shard takes at a time.
      stores: paths of stores of embeddings; () for the embeddings in the records.
      categories: read only records of these categories; () is all.
    """

    def __init__(
        self,
        name: str,
        data_dir: str = "data",
        start: int = 0,
        block: int = 1,
        stores: Sequence[str] = (),
        categories: Sequence[str] = (),
    ):
        super().__init__(
            splits=check.SPLITS,
            caching_permitted=False,  # SeqIO's cache cannot hold images and bfloat16
            performs_internal_shuffling=True,
        )
        self.name, self.data_dir, self.start, self.block = name, data_dir, start, block
        self.stores, self.categories = tuple(stores), tuple(categories)

    def at(self, data_dir: str, **settings) -> RecordsSource:
        """Returns a source of the same dataset in `data_dir`, with the class's other arguments."""
        return RecordsSource(self.name, data_dir, **settings)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [f"{self.name}:{split}"]

    def num_input_examples(self, split: str) -> int:
        """Counts the records of the wanted categories."""
        return len(self._kept(dataset.open_dataset(self.data_dir, self.name).info, split))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        """Returns the decoded records of this shard, endless if `shuffle`; seed None is 0.

        Raises:
          UserError: data_dir has no such dataset, the dataset lacks a category, or a store lacks a
            caption.
        """
        info = dataset.open_dataset(self.data_dir, self.name).info
        kept = self._kept(info, split)
        paths, offsets = dataset.record_offsets(info, split)
        offsets = offsets[kept]
        n = len(offsets)
        positions = self.order(n, (seed or 0) if shuffle else None, shard_info)
        paths, offsets = tf.constant(paths), tf.constant(offsets)

        def read(index: tf.Tensor) -> dict[str, tf.Tensor]:
            serialized = _read_record(paths[offsets[index, 0]], offsets[index, 1])
            return info.features.deserialize_example(serialized)

        embeds = []
        for path in self.stores:
            store = open_store(path)
            where = store.locate(dataset.caption_keys(info, split)[kept])
            if (missing := np.flatnonzero(where[:, 0] < 0)).size:
                caption = read(tf.constant(missing[0]))["caption"].numpy().decode()
                raise UserError(
                    f"data.embeddings={path} lacks {missing.size} of the {n} captions of "
                    f"{self.name}:{split}, for example {caption!r}"
                )
            embeds.append(_in_store(store, where))
        embeds = embeds or [_in_record]

        # One map does everything: for small records, another stage costs as much as the work in it.
        def row(g: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
            record = read(index)
            embedded = [embed(record, index) for embed in embeds]
            del record["text_tokens"]
            keys = embedding_keys(len(embeds))
            return {**record, **dict(zip(keys, embedded, strict=True)), "position": g}

        return positions.map(row, tf.data.AUTOTUNE)

    def _kept(self, info: tfds.core.DatasetInfo, split: str) -> np.ndarray:
        """Returns the indices of the records of the wanted categories."""
        if not self.categories:
            return np.arange(info.splits[split].num_examples)
        found = np.array(list(dataset.strings(info, split, "category")))
        if not any(found):
            raise check.no_categories(self.name)
        if unknown := set(self.categories) - set(found):
            raise UserError(
                f"config.data.categories has {min(unknown)!r}; {self.name}:{split} has: "
                f"{', '.join(sorted(set(found)))}"
            )
        return np.flatnonzero(np.isin(found, self.categories))

    def order(
        self, n: int, seed: int | None, shard_info: seqio.ShardInfo | None = None
    ) -> tf.data.Dataset:
        """Yields int64 pairs: a global position of this shard, and the index below n of its record.

        The order is shuffled and endless; if the seed is None, it is one pass in order.
        """
        shard = shard_info or seqio.ShardInfo(0, 1)
        first = self.start + self.block * shard.index
        stride = self.block * shard.num_shards

        def some(i: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
            m = i * _POSITIONS + tf.range(_POSITIONS, dtype=tf.int64)
            g = first + m // self.block * stride + m % self.block
            return g, g if seed is None else _shuffled(g, n, seed)

        positions = tf.data.Dataset.counter().map(some).unbatch()
        return positions if seed is not None else positions.take_while(lambda g, index: index < n)


def _shuffled(g: tf.Tensor, n: int, seed: int) -> tf.Tensor:
    """Returns the records at global positions g [k]; each epoch of a seed has a permutation."""
    # tf.random.experimental.index_shuffle prepends this constant to its seed. We call its raw op
    # instead, because the function takes one seed for all rows and we need one per row.
    first = tf.fill(tf.shape(g), tf.constant(498247692, tf.int64))
    seeds = tf.stack([first, tf.fill(tf.shape(g), tf.constant(seed, tf.int64)), g // n], axis=1)
    last = tf.constant(n - 1, g.dtype)
    return tf.raw_ops.RandomIndexShuffle(index=g % n, seed=seeds, max_index=last, rounds=4)


def _read_record(path: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """Reads the record of a TFRecord file that starts at byte `offset`.

    This is TensorFlow only. If tf.data calls into Python, dropping its iterator can deadlock: it
    holds the interpreter's lock and waits for the call, which waits for the lock.
    """
    from_there = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path],
        compression_type="",
        buffer_size=tf.constant(0, tf.int64),  # do not read ahead
        byte_offsets=[offset],
    )
    dataset = tf.data.experimental.from_variant(from_there, tf.TensorSpec([], tf.string))
    return dataset.take(1).get_single_element()


# Maps a record and its index to the embedding of its caption, bfloat16 [n, dim].
Embed = Callable[[dict[str, tf.Tensor], tf.Tensor], tf.Tensor]


def _in_record(record: dict[str, tf.Tensor], index: tf.Tensor) -> tf.Tensor:
    """Returns the embedding stored in the record; an `Embed`."""
    flat = tf.io.decode_raw(record["text_embeddings"], tf.bfloat16)
    return tf.reshape(flat, [record["text_tokens"], -1])


def _in_store(store: Store, where: np.ndarray) -> Embed:
    """Returns an `Embed` that reads from a store; `where` is store.locate of all records."""
    paths = tf.constant([str(store.file(i, ".tfrecord")) for i in range(store.num_shards)])
    where = tf.constant(where)

    def embed(record: dict[str, tf.Tensor], index: tf.Tensor) -> tf.Tensor:
        stored = _read_record(paths[where[index, 0]], where[index, 1])
        return _UNPACK[store.dtype](stored, store.dim)

    return embed


def _unpack_int8(stored: tf.Tensor, dim: int) -> tf.Tensor:
    tokens = tf.reshape(tf.io.decode_raw(stored, tf.int8), [-1, 4 + dim])
    scales = tf.bitcast(tokens[:, :4], tf.float32)
    return tf.cast(tf.cast(tokens[:, 4:], tf.float32) * scales[:, None], tf.bfloat16)


# `unpack` of embeddings.store.FORMS, in TensorFlow.
_UNPACK = {
    "bfloat16": lambda stored, dim: tf.reshape(tf.io.decode_raw(stored, tf.bfloat16), [-1, dim]),
    "int8": _unpack_int8,
}


for _name, _dataset in check.TASKS.items():
    seqio.TaskRegistry.add(
        _name,
        source=RecordsSource(_dataset),
        preprocessors=[],
        output_features={
            "image": seqio.Feature(
                seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.uint8, rank=3
            ),
            "text_embeddings": seqio.Feature(
                seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.bfloat16, rank=2
            ),
        },
        shuffle_buffer_size=None,  # the source shuffles indices, which takes less memory
    )
