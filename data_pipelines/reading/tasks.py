"""The SeqIO tasks, and the source they read: records by index, in an order that is a formula.

A task yields, in addition to the strings id, caption, category and scene, image uint8 [H, W, 3],
text_embeddings bfloat16 [n, dim] without padding, and position, int64, where in the stream it is;
with several stores of embeddings, those of the others as text_embeddings_1 and so on. It is opened
where its records are:

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
from data_pipelines.records import dataset
from imagen_jax.common.errors import UserError

_TASKS = {
    "scenes_32": "scenes/32",
    "scenes_64": "scenes/64",
    "scenes_256": "scenes/256",
    "scenes_1024": "scenes/1024",
    "emoji": "emoji",
    "folder": "folder",
}
_SPLITS = ("train", "validation", "heldout")
# How many at a time are computed: of one alone, it takes as long as parsing its record.
_POSITIONS = 64


def names() -> list[str]:
    """The names of the tasks that this module registers."""
    return list(_TASKS)


def embedding_keys(num: int) -> list[str]:
    """Where a record has the embeddings of `num` encoders."""
    return ["text_embeddings", *(f"text_embeddings_{i}" for i in range(1, num))]


class RecordsSource(seqio.DataSource):
    """Records in an index-based order, so that the position of the data is one integer.

    Global positions count from 0 for ever. Shuffled, position g is record perm(g % n) of an epoch
    g // n with its own permutation, and the stream is endless; in order, it is record g, for one
    pass. Shards take blocks of positions in turn, so what the shards have read together depends on
    neither their number nor the size of a block.

    Args:
      name: the dataset, such as "scenes/32".
      data_dir: where datasets live.
      start: the first global position; where to resume.
      block: how many consecutive positions a shard takes at a time.
      stores: the paths of stores to take embeddings from; none for those in the records.
      categories: the records are those of these categories alone; () is all.
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
            splits=_SPLITS,
            caching_permitted=False,  # SeqIO's cache cannot hold images and bfloat16
            performs_internal_shuffling=True,
        )
        self.name, self.data_dir, self.start, self.block = name, data_dir, start, block
        self.stores, self.categories = tuple(stores), tuple(categories)

    def at(self, data_dir: str, **settings) -> RecordsSource:
        """The same dataset in `data_dir`, with other settings; see the class."""
        return RecordsSource(self.name, data_dir, **settings)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [f"{self.name}:{split}"]

    def num_input_examples(self, split: str) -> int:
        """How many records of the wanted categories there are."""
        return len(self._kept(dataset.open_dataset(self.data_dir, self.name).info, split))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        """The records of this shard, decoded; endless if `shuffle`. No seed is seed 0.

        Raises:
          UserError: there is no such dataset in data_dir, it has no such category, or the store
            lacks one of its captions.
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

        # One map for everything: for small records a stage costs as much as its work.
        def row(g: tf.Tensor, index: tf.Tensor) -> dict[str, tf.Tensor]:
            record = read(index)
            embedded = [embed(record, index) for embed in embeds]
            del record["text_tokens"]
            keys = embedding_keys(len(embeds))
            return {**record, **dict(zip(keys, embedded, strict=True)), "position": g}

        return positions.map(row, tf.data.AUTOTUNE)

    def _kept(self, info: tfds.core.DatasetInfo, split: str) -> np.ndarray:
        """Indices of the records that are of the wanted categories."""
        if not self.categories:
            return np.arange(info.splits[split].num_examples)
        found = np.array(list(dataset.strings(info, split, "category")))
        if unknown := set(self.categories) - set(found):
            raise UserError(
                f"config.data.categories has {min(unknown)!r}; {self.name}:{split} has: "
                f"{', '.join(sorted(set(found)))}"
            )
        return np.flatnonzero(np.isin(found, self.categories))

    def order(
        self, n: int, seed: int | None, shard_info: seqio.ShardInfo | None = None
    ) -> tf.data.Dataset:
        """This shard's global positions and which of n records is at each: pairs of int64.

        Endless and shuffled; without a seed (None), the records in order, once.
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
    """The records at global positions g [k]: each epoch and seed permutes range(n) anew."""
    # tf.random.experimental.index_shuffle puts this before a seed, but not before one of each row.
    first = tf.fill(tf.shape(g), tf.constant(498247692, tf.int64))
    seeds = tf.stack([first, tf.fill(tf.shape(g), tf.constant(seed, tf.int64)), g // n], axis=1)
    last = tf.constant(n - 1, g.dtype)
    return tf.raw_ops.RandomIndexShuffle(index=g % n, seed=seeds, max_index=last, rounds=4)


def _read_record(path: tf.Tensor, offset: tf.Tensor) -> tf.Tensor:
    """The record of a TFRecord file that starts at byte `offset`.

    In TensorFlow alone, because dropping an iterator while tf.data calls into Python can hang: it
    waits for the call while it holds the interpreter's lock, which the call waits for.
    """
    from_there = tf.raw_ops.TFRecordDatasetV2(
        filenames=[path],
        compression_type="",
        buffer_size=tf.constant(0, tf.int64),  # nothing of the records behind it
        byte_offsets=[offset],
    )
    dataset = tf.data.experimental.from_variant(from_there, tf.TensorSpec([], tf.string))
    return dataset.take(1).get_single_element()


# From a record and its index to the embedding of its caption, bfloat16 [n, dim].
Embed = Callable[[dict[str, tf.Tensor], tf.Tensor], tf.Tensor]


def _in_record(record: dict[str, tf.Tensor], index: tf.Tensor) -> tf.Tensor:
    """The embedding that the record brings itself; an `Embed`."""
    flat = tf.io.decode_raw(record["text_embeddings"], tf.bfloat16)
    return tf.reshape(flat, [record["text_tokens"], -1])


def _in_store(store: Store, where: np.ndarray) -> Embed:
    """What takes it out of a store; `where` is what store.locate says of all records."""
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


# What the `unpack` of FORMS does, in TensorFlow.
_UNPACK = {
    "bfloat16": lambda stored, dim: tf.reshape(tf.io.decode_raw(stored, tf.bfloat16), [-1, dim]),
    "int8": _unpack_int8,
}


for _name, _dataset in _TASKS.items():
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
        shuffle_buffer_size=None,  # the source has shuffled indices; tensors would cost memory
    )
