"""The SeqIO tasks. Training reads their sources by position; SeqIO's own tools read them in order.

A task yields

  id, caption, category, scene   strings
  image                          uint8 [H, W, 3]
  text_embeddings                bfloat16 [n, dim], not padded; absent if the records have none
  position                       int64, the position in the stream

Its source is replaced by one at the data's directory:

    task = seqio.get_mixture_or_task("scenes_32")
    task = task.replace(source=task.source.at(data_dir="data", start=0))
    task.get_dataset(split="train", shuffle=True, seed=0, num_epochs=1, try_in_mem_cache=False)

To train on a mixture, register it in the config file and name it in config.data.task:

    from data_pipelines.reading import tasks
    tasks.seqio.MixtureRegistry.add("both", [("folder", 0.7), ("emoji", 0.3)])
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from data_pipelines.embeddings.lookup import Lookup
from data_pipelines.reading import check, images
from data_pipelines.reading.order import Order
from data_pipelines.records import prepared
from data_pipelines.records.opening import open_split
from data_pipelines.records.source import Bad, Record
from imagen_jax.common.errors import UserError

_POSITIONS = 64  # computed at once


def names() -> list[str]:
    """Returns the names of the tasks that this module registers."""
    return list(check.TASKS)


class RecordsSource(seqio.DataSource):
    """The records of a dataset in a computed order, so the position in the data is one integer.

    Shuffled, the stream is endless; in order, it ends after one pass. Shards take blocks of
    positions in turn, so together they read the same records whatever their number and the block.

    Args:
      name: the dataset, such as "scenes/32".
      data_dir: directory of the datasets.
      start: the first position.
      block: consecutive positions that a shard takes at a time.
      window: config.data.shuffle_window.
    """

    def __init__(
        self, name: str, data_dir: str = "data", start: int = 0, block: int = 1, window: int = 0
    ):
        super().__init__(
            splits=check.SPLITS,
            caching_permitted=False,  # SeqIO's cache cannot hold images and bfloat16
            performs_internal_shuffling=True,
        )
        self.name, self.data_dir = name, data_dir
        self.start, self.block, self.window = start, block, window

    def at(self, data_dir: str, **settings) -> RecordsSource:
        """Returns a source of the same dataset in `data_dir`, with the class's other arguments."""
        return RecordsSource(self.name, data_dir, **settings)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        return True

    def list_shards(self, split: str) -> list[str]:
        return [f"{self.name}:{split}"]

    def num_input_examples(self, split: str) -> int:
        """Counts the records."""
        return len(open_split(self.data_dir, self.name, split))

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        **unused,
    ) -> tf.data.Dataset:
        """Returns the decoded records of this shard, endless if `shuffle`; seed None is 0.

        Reading a bad record raises a UserError.
        """
        source = open_split(self.data_dir, self.name, split)
        order = Order(len(source), (seed or 0) if shuffle else None, self.window)
        embedded = prepared.dataset_info(self.data_dir, self.name).text_identity is not None
        lookups = [Lookup(store) for store in prepared.own_store(self.data_dir, self.name)]
        embed = (lambda record: lookups[0](record.captions[0])) if lookups else Record.embedded
        shard = shard_info or seqio.ShardInfo(0, 1)

        def rows() -> Iterator[dict[str, Any]]:
            for block in itertools.count():
                m = block * _POSITIONS + np.arange(_POSITIONS)
                turn, inside = np.divmod(m, self.block)
                g = self.start + (turn * shard.num_shards + shard.index) * self.block + inside
                for position, index in zip(g.tolist(), order.index(g).tolist(), strict=True):
                    if not shuffle and position >= len(source):
                        return
                    yield _row(
                        source.read(index, index + 1)[0], position, embed if embedded else None
                    )

        strings = {k: tf.TensorSpec([], tf.string) for k in ("id", "caption", "category", "scene")}
        signature = {
            **strings,
            "image": tf.TensorSpec([None, None, 3], tf.uint8),
            "position": tf.TensorSpec([], tf.int64),
        }
        if embedded:
            signature["text_embeddings"] = tf.TensorSpec([None, None], tf.bfloat16)
        return tf.data.Dataset.from_generator(rows, output_signature=signature)


def _row(record: Any, position: int, embed: Callable | None) -> dict[str, Any]:
    try:
        if isinstance(record, Bad):
            raise record
        image = images.decode_whole(record.image)
    except Bad as bad:
        raise UserError(f"the record at position {position} is bad: {bad}") from bad
    row = {"id": record.id, "image": image, "caption": record.captions[0], "position": position}
    row |= {"category": record.category, "scene": record.scene}
    if embed:
        row["text_embeddings"] = embed(record)
    return row


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
