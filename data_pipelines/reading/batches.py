"""SeqIO tasks -> this host's batches as NumPy arrays.

The order of examples is a pure function of the seed and of a global position, so the position of
the data is one number, and the same whatever the number of hosts (see records.dataset).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf
from tqdm import tqdm

from data_pipelines.embeddings.store import check_identity, open_store
from data_pipelines.reading import tasks
from data_pipelines.records import dataset
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.typed_config import require
from imagen_jax.config import Config
from imagen_jax.devices.memory import physical_memory
from imagen_jax.devices.topologies import GIB
from imagen_jax.diffusion.conditioning import pad_text

# Accelerators belong to JAX.
tf.config.set_visible_devices([], "GPU")

Batch = dict[str, np.ndarray]

# How many records are read into memory at a time.
_CHUNK = 256
_STRINGS = ("caption", "category", "scene")
TOO_SMALL = "an image is smaller than config.model.image_size (or config.data.image_size, if set)"


def build(config: Config) -> None:
    """Draws the scenes of `data.task` if the key `data.build` asks and they are not there yet.

    Raises:
      UserError: the task is not one of scenes, or others are there.
    """
    if not config.data.build:
        return
    from data_pipelines.scenes import builder  # only a run that may have to draw needs it

    data, text = config.data, config.text
    builder.prepare(
        data.task, data.dir, data.num_train, text.encoder, text.max_tokens, data.categories
    )


def open_task(config: Config) -> seqio.Task:
    """The SeqIO task of `data.task`, after checking that its records fit the config.

    Raises:
      UserError: unknown task, no such dataset, images too small, or embeddings of another encoder.
    """
    name = config.data.task
    if name not in tasks.names():
        raise UserError(f"config.data.task is {name!r}; allowed: {', '.join(tasks.names())}")
    task = seqio.get_mixture_or_task(name)
    info = dataset.dataset_info(config.data.dir, task.source.name)
    found = [(f"data.embeddings={s}", open_store(s).text_identity) for s in config.stores]
    found = found or [(f"data.task={name} in {config.data.dir}", info.text_identity)]
    parts = config.text.parts
    allowed = f"{len(parts)} stores joined by +, one for each of text.encoder={config.text.encoder}"
    require(len(found) == len(parts), "data.embeddings", config.data.embeddings, allowed)
    for part, (where, identity) in zip(parts, found, strict=True):
        check_identity(identity, *part, where)
    return task


def train_batches(
    config: Config, position: int, shard: int = 0, num_shards: int = 1
) -> Iterator[Batch]:
    """This host's share of the training batches, endless.

    Args:
      position: global examples already consumed; a multiple of the batch size.
      shard: this host; its rows are the contiguous block `shard` of every global batch.

    Returns:
      Dicts of image uint8 [b, H, W, 3], text bfloat16 [b, T, D], text_mask bool [b, T], with
      b = batch_size / num_shards.
    """
    split, info = "train", seqio.ShardInfo(shard, num_shards)
    if config.data.in_memory:
        return _numpy_batches(config, _from_memory(config, split, position, info))
    return _numpy_batches(config, _from_disk(config, split, position, info))


def eval_batches(config: Config, shard: int = 0, num_shards: int = 1) -> list[Batch]:
    """The first `eval_batches` batches of the evaluation split, the same at every call."""
    info = seqio.ShardInfo(shard, num_shards)
    batches = _numpy_batches(config, _from_disk(config, config.data.eval_split, 0, info))
    return [next(batches) for _ in range(config.eval_batches)]


def examples(config: Config, split: str, num: int) -> list[dict[str, Any]]:
    """The first `num` records of a split, for drawing samples of their captions.

    Returns:
      Dicts of caption, category, scene (str), image (uint8 [H, W, 3]), text (bfloat16 [T, D]) and
      text_mask (bool [T]).
    """
    rows = _rows(config, _source(config, split), split, shuffle=False, strings=_STRINGS)
    rows = rows.take(num).map(lambda row: {**row, "image": _crop(config, row["image"])})
    out = []
    for row in _guarded(config, rows.as_numpy_iterator()):
        padded = pad_text(config.text.parts, *([row[key]] for key in _text_keys(config)))
        strings = {k: row[k].decode() for k in _STRINGS}
        out.append({**strings, "image": row["image"], **{k: v[0] for k, v in padded.items()}})
    return out


@dataclasses.dataclass(frozen=True)
class Reader:
    """The data of one run: `training.reader.Reader` over the SeqIO task of a config.

    Raises:
      UserError: as `open_task`.
    """

    config: Config

    def __post_init__(self):
        open_task(self.config)

    def train_batches(self, position: int, shard: int = 0, num_shards: int = 1) -> Iterator[Batch]:
        """See `train_batches`."""
        return train_batches(self.config, position, shard, num_shards)

    def eval_batches(self, shard: int = 0, num_shards: int = 1) -> list[Batch]:
        """See `eval_batches`."""
        return eval_batches(self.config, shard, num_shards)

    def examples(self, split: str, num: int) -> list[dict[str, Any]]:
        """See `examples`."""
        return examples(self.config, split, num)


def stack_text(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The text [N, T, D] and text_mask [N, T] of what `examples` returned."""
    return {k: np.stack([row[k] for row in rows]) for k in ("text", "text_mask")}


def _from_disk(config: Config, split: str, position: int, info: seqio.ShardInfo) -> tf.data.Dataset:
    """Batches of image uint8 [b, H, W, 3] and ragged embeddings, endless; records as they come."""
    size = config.batch_size // info.num_shards
    rows = _rows(config, _source(config, split, position, size), split, info)
    if config.full_size > config.unet.image_size:
        rows = rows.map(
            lambda row: {**row, "image": _crop(config, row["image"], row["position"])},
            tf.data.AUTOTUNE,
        )
    return rows.ragged_batch(size, drop_remainder=True)


def _from_memory(
    config: Config, split: str, position: int, info: seqio.ShardInfo
) -> tf.data.Dataset:
    """The same batches; all records are decoded now, and kept."""
    kept = _whole_split(config, split)
    size = config.batch_size // info.num_shards
    order = _source(config, split, position, size).order(len(kept["image"]), config.seed, info)

    def batch(positions: tf.Tensor, indices: tf.Tensor) -> dict[str, Any]:
        rows = {key: tf.gather(values, indices) for key, values in kept.items()}
        if config.full_size > config.unet.image_size:
            spec = tf.TensorSpec((config.unet.image_size,) * 2 + (3,), tf.uint8)
            at = (rows["image"], positions)
            rows["image"] = tf.map_fn(lambda x: _crop(config, *x), at, fn_output_signature=spec)
        return rows

    return order.batch(size, drop_remainder=True).map(batch, tf.data.AUTOTUNE)


def _whole_split(config: Config, split: str) -> dict[str, Any]:
    """Image uint8 [n, S, S, 3] and ragged embeddings [n, (t), D] of all records of a split.

    Raises:
      UserError: they would take more than a quarter of this machine's memory.
    """
    source = _source(config, split)
    num, available = source.num_input_examples(split), physical_memory()
    keys = ("image", *_text_keys(config))
    rows = _rows(config, source, split, shuffle=False).ragged_batch(_CHUNK)
    rows = ({key: row[key] for key in keys} for row in _guarded(config, iter(rows)))
    chunks = [next(rows)]
    read = len(chunks[0]["image"])
    needed = num / read * sum(map(_bytes, chunks[0].values()))
    if needed > available / 4:  # putting the parts together takes as much again
        raise UserError(
            f"config.data.in_memory is True, but {num:,} records take {needed / GIB:.1f} GiB; "
            f"allowed is a quarter of this machine's {available / GIB:.1f} GiB"
        )
    words = {"desc": "reading into memory", "unit": " records"}
    with tqdm(total=num, initial=read, disable=not log.isEnabledFor(logging.INFO), **words) as bar:
        for chunk in rows:
            chunks.append(chunk)
            bar.update(len(chunk["image"]))
    return {key: tf.concat([chunk[key] for chunk in chunks], axis=0) for key in keys}


def _bytes(values: tf.Tensor | tf.RaggedTensor) -> int:
    flat = getattr(values, "flat_values", values)
    return int(tf.size(flat)) * flat.dtype.size


def _source(config: Config, split: str, start: int = 0, block: int = 1) -> tasks.RecordsSource:
    """The records of the config's task, after checking that it has such a split."""
    source = open_task(config).source
    available = dataset.dataset_info(config.data.dir, source.name).num_examples
    if split not in available:
        allowed = ", ".join(available)
        raise UserError(f"data.task={config.data.task} has no split {split!r}; it has: {allowed}")
    return source.at(
        config.data.dir,
        start=start,
        block=block,
        stores=config.stores,
        categories=config.data.categories,
    )


def _rows(
    config: Config,
    source: tasks.RecordsSource,
    split: str,
    info: seqio.ShardInfo | None = None,
    shuffle: bool = True,
    strings: Sequence[str] = (),
) -> tf.data.Dataset:
    """Records as image uint8 [S, S, 3], S of `full_size`, embeddings, position and `strings`."""
    task = seqio.get_mixture_or_task(config.data.task).replace(source=source)
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=shuffle,
        seed=config.seed,
        shard_info=info,
        num_epochs=1,  # a shuffled source is endless by itself
        try_in_mem_cache=False,
        trim_output_features=False,  # nothing to do, and a stage for it
    )
    keys = ("position", *strings)

    def shape(row):
        dims = zip(_text_keys(config), config.text.parts, strict=True)
        text = {key: tf.ensure_shape(row[key], (None, part.dim)) for key, part in dims}
        image = _fit(row["image"], config.full_size)
        return {"image": image, **text, **{key: row[key] for key in keys}}

    options = tf.data.Options()
    # Finding out how many threads each stage wants took a quarter of the time that reading takes;
    # without, each may use them all.
    options.autotune.enabled = False
    return dataset.map(shape, tf.data.AUTOTUNE).with_options(options)


def _fit(image: tf.Tensor, size: int) -> tf.Tensor:
    """The centre square at the model's resolution; antialiased where it shrinks."""
    shape = tf.shape(image)
    side = tf.minimum(shape[0], shape[1])
    top, left = tf.unstack((shape[:2] - side) // 2)
    image = image[top : top + side, left : left + side]

    def shrink():
        small = tf.image.resize(image, (size, size), method="area")
        return tf.cast(tf.clip_by_value(tf.round(small), 0, 255), tf.uint8)

    tf.debugging.assert_greater_equal(side, size, TOO_SMALL)
    image = tf.cond(tf.equal(side, size), lambda: image, shrink)
    return tf.ensure_shape(image, (size, size, 3))


def _crop(config: Config, image: tf.Tensor, position: tf.Tensor | None = None) -> tf.Tensor:
    """A square of model.image_size, its place random in the seed and position; without, central.

    Its corner is a multiple of the upscaling, so that shrinking the crop gives exactly the crop of
    the shrunk image: super-resolution sees in training what it will be given.
    """
    size, step = config.unet.image_size, config.upscale
    places = (config.full_size - size) // step + 1
    if position is None:
        corner = tf.fill([2], places // 2)
    else:
        seed = tf.stack([tf.constant(config.seed, tf.int64), position])
        corner = tf.random.stateless_uniform([2], seed, maxval=places, dtype=tf.int32)
    return tf.image.crop_to_bounding_box(image, *tf.unstack(corner * step), size, size)


def _text_keys(config: Config) -> list[str]:
    return tasks.embedding_keys(len(config.text.parts))


def _numpy_batches(config: Config, dataset: tf.data.Dataset) -> Iterator[Batch]:
    keys = _text_keys(config)
    # Ragged until here: padding to the token limit multiplies the bytes an example by five.
    for rows in _guarded(config, iter(dataset.prefetch(tf.data.AUTOTUNE))):
        captions = [_split(rows[key]) for key in keys]
        yield {"image": rows["image"].numpy(), **pad_text(config.text.parts, *captions)}


def _split(ragged: tf.RaggedTensor) -> list[np.ndarray]:
    ends = np.cumsum(ragged.row_lengths().numpy())
    return np.split(ragged.flat_values.numpy(), ends[:-1])


def _guarded(config: Config, rows: Iterator) -> Iterator:
    """Turns an error of TensorFlow while reading into one line."""
    try:
        yield from rows
    except tf.errors.OpError as e:
        first = e.message.splitlines()[0]
        raise UserError(f"reading data.task={config.data.task} failed: {first}") from e
