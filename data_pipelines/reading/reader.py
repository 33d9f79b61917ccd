"""Reads SeqIO tasks and yields this host's batches as NumPy arrays.

The example at a global position is a pure function of the position and the seed, so the position in
the data is one number that does not depend on the number of hosts (see reading.tasks).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from tqdm import tqdm

from data_pipelines.reading import check
from data_pipelines.reading.rows import crop, guarded, rows_of, source_of, text_keys
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config
from imagen_jax.devices.memory import physical_memory
from imagen_jax.devices.topologies import GIB
from imagen_jax.diffusion.conditioning import pad_text

Batch = dict[str, np.ndarray]

# Records read into memory at a time.
_CHUNK = 256
_STRINGS = ("caption", "category", "scene")


def build(config: Config) -> None:
    """Draws the scenes of `data.task` if `data.build` is set and they do not exist yet.

    Raises:
      UserError: the task has no scenes, or different ones exist.
    """
    if not config.data.build:
        return
    from data_pipelines.scenes import builder  # other runs do not need it

    data, text = config.data, config.text
    builder.prepare(
        data.task, data.dir, data.num_train, text.encoder, text.max_tokens, data.categories
    )


@dataclasses.dataclass(frozen=True)
class Reader:
    """The data of one run: training.reader.Reader over the SeqIO task of a config.

    Raises:
      UserError: as check.check_dataset.
    """

    config: Config

    def __post_init__(self):
        check.check_dataset(self.config)

    def train_batches(self, position: int, shard: int = 0, num_shards: int = 1) -> Iterator[Batch]:
        """Returns this host's share of the training batches, without end.

        Args:
          position: global examples already consumed, a multiple of the batch size.
          shard: this host. Its rows are the contiguous block `shard` of every global batch.

        Returns:
          An iterator of dicts of image uint8 [b, H, W, 3], text bfloat16 [b, T, D] and text_mask
          bool [b, T], with b = batch_size / num_shards.
        """
        split, info = "train", seqio.ShardInfo(shard, num_shards)
        if self.config.data.in_memory:
            return self._numpy_batches(self._from_memory(split, position, info))
        return self._numpy_batches(self._from_disk(split, position, info))

    def eval_batches(self, shard: int = 0, num_shards: int = 1) -> list[Batch]:
        """Returns the first `config.eval_batches` batches of the evaluation split."""
        info = seqio.ShardInfo(shard, num_shards)
        batches = self._numpy_batches(self._from_disk(self.config.data.eval_split, 0, info))
        return [next(batches) for _ in range(self.config.eval_batches)]

    def examples(self, split: str, num: int) -> list[dict[str, Any]]:
        """Returns the first `num` records of a split, whose captions serve as prompts.

        Returns:
          Dicts of caption, category and scene (str), image uint8 [H, W, 3], text bfloat16 [T, D]
          and text_mask bool [T].
        """
        config = self.config
        rows = rows_of(config, source_of(config, split), split, shuffle=False, strings=_STRINGS)
        rows = rows.take(num).map(lambda row: {**row, "image": crop(config, row["image"])})
        out = []
        for row in guarded(config, rows.as_numpy_iterator()):
            padded = pad_text(config.text.parts, *([row[key]] for key in text_keys(config)))
            strings = {k: row[k].decode() for k in _STRINGS}
            out.append({**strings, "image": row["image"], **{k: v[0] for k, v in padded.items()}})
        return out

    def _from_disk(self, split: str, position: int, info: seqio.ShardInfo) -> tf.data.Dataset:
        """Yields batches of image uint8 [b, H, W, 3] and ragged embeddings, reading as it goes."""
        config = self.config
        size = config.batch_size // info.num_shards
        rows = rows_of(config, source_of(config, split, position, size), split, info)
        if config.full_size > config.unet.image_size:
            rows = rows.map(
                lambda row: {**row, "image": crop(config, row["image"], row["position"])},
                tf.data.AUTOTUNE,
            )
        return rows.ragged_batch(size, drop_remainder=True)

    def _from_memory(self, split: str, position: int, info: seqio.ShardInfo) -> tf.data.Dataset:
        """Decodes all records now, then yields the same batches as `_from_disk`."""
        config = self.config
        kept = self._whole_split(split)
        size = config.batch_size // info.num_shards
        order = source_of(config, split, position, size).order(
            len(kept["image"]), config.seed, info
        )

        def batch(positions: tf.Tensor, indices: tf.Tensor) -> dict[str, Any]:
            rows = {key: tf.gather(values, indices) for key, values in kept.items()}
            if config.full_size > config.unet.image_size:
                spec = tf.TensorSpec((config.unet.image_size,) * 2 + (3,), tf.uint8)
                at = (rows["image"], positions)
                rows["image"] = tf.map_fn(lambda x: crop(config, *x), at, fn_output_signature=spec)
            return rows

        return order.batch(size, drop_remainder=True).map(batch, tf.data.AUTOTUNE)

    def _whole_split(self, split: str) -> dict[str, Any]:
        """Decodes a whole split: image uint8 [n, S, S, 3] and ragged embeddings [n, (t), D].

        Raises:
          UserError: it would take more than a quarter of this machine's memory.
        """
        config = self.config
        source = source_of(config, split)
        num, available = source.num_input_examples(split), physical_memory()
        keys = ("image", *text_keys(config))
        rows = rows_of(config, source, split, shuffle=False).ragged_batch(_CHUNK)
        rows = ({key: row[key] for key in keys} for row in guarded(config, iter(rows)))
        chunks = [next(rows)]
        read = len(chunks[0]["image"])
        needed = num / read * sum(map(_bytes, chunks[0].values()))
        if needed > available / 4:  # concatenating needs a second copy
            raise UserError(
                f"config.data.in_memory is True, but {num:,} records take {needed / GIB:.1f} GiB; "
                f"allowed: a quarter of this machine's {available / GIB:.1f} GiB. Set "
                "--config.data.in_memory=false"
            )
        words = {"desc": "reading into memory", "unit": " records"}
        with tqdm(
            total=num, initial=read, disable=not log.isEnabledFor(logging.INFO), **words
        ) as bar:
            for chunk in rows:
                chunks.append(chunk)
                bar.update(len(chunk["image"]))
        return {key: tf.concat([chunk[key] for chunk in chunks], axis=0) for key in keys}

    def _numpy_batches(self, dataset: tf.data.Dataset) -> Iterator[Batch]:
        config = self.config
        keys = text_keys(config)
        # Padding comes last: an example padded to the token limit takes five times the bytes.
        for rows in guarded(config, iter(dataset.prefetch(tf.data.AUTOTUNE))):
            captions = [_split(rows[key]) for key in keys]
            yield {"image": rows["image"].numpy(), **pad_text(config.text.parts, *captions)}


def _bytes(values: tf.Tensor | tf.RaggedTensor) -> int:
    flat = getattr(values, "flat_values", values)
    return int(tf.size(flat)) * flat.dtype.size


def _split(ragged: tf.RaggedTensor) -> list[np.ndarray]:
    ends = np.cumsum(ragged.row_lengths().numpy())
    return np.split(ragged.flat_values.numpy(), ends[:-1])
