"""SeqIO tasks -> this host's batches as NumPy arrays. The only module here that imports TensorFlow.

The order of examples is a pure function of the seed and of a global position, so the position of
the data is one number, and the same whatever the number of hosts (see data_pipelines.records).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import seqio
import tensorflow as tf

from data_pipelines import embeddings, records, tasks
from imagen_jax.config import require
from imagen_jax.errors import UserError
from imagen_jax.run_config import Config

# Accelerators belong to JAX.
tf.config.set_visible_devices([], "GPU")

Batch = dict[str, np.ndarray]

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
    info = records.dataset_info(config.data.dir, task.source.name)
    found = [
        (f"data.embeddings={s}", embeddings.open_store(s).text_identity) for s in config.stores
    ]
    found = found or [(f"data.task={name} in {config.data.dir}", info.text_identity)]
    parts = config.text.parts
    allowed = f"{len(parts)} stores joined by +, one for each of text.encoder={config.text.encoder}"
    require(len(found) == len(parts), "data.embeddings", config.data.embeddings, allowed)
    for part, (where, identity) in zip(parts, found, strict=True):
        embeddings.check_identity(identity, *part, where)
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
    local = config.batch_size // num_shards
    source = dict(data_dir=config.data.dir, start=position, block=local)
    dataset = _dataset(config, "train", source, seqio.ShardInfo(shard, num_shards), shuffle=True)
    return _numpy_batches(config, dataset, local)


def eval_batches(config: Config, shard: int = 0, num_shards: int = 1) -> list[Batch]:
    """The first `eval_batches` batches of the evaluation split, the same at every call."""
    local = config.batch_size // num_shards
    source = dict(data_dir=config.data.dir, start=0, block=local)
    info = seqio.ShardInfo(shard, num_shards)
    dataset = _dataset(config, config.data.eval_split, source, info, shuffle=True)
    batches = _numpy_batches(config, dataset, local)
    return [next(batches) for _ in range(config.eval_batches)]


def examples(config: Config, split: str, num: int) -> list[dict[str, Any]]:
    """The first `num` records of a split, for drawing samples of their captions.

    Returns:
      Dicts of caption, category, scene (str), image (uint8 [H, W, 3]), text (bfloat16 [T, D]) and
      text_mask (bool [T]).
    """
    source = dict(data_dir=config.data.dir, start=0, block=1)
    dataset = _dataset(config, split, source, None, shuffle=False)
    out = []
    for row in _guarded(config, dataset.take(num).as_numpy_iterator()):
        padded = config.text.pad(*([row[key]] for key in _text_keys(config)))
        strings = {k: row[k].decode() for k in ("caption", "category", "scene")}
        out.append({**strings, "image": row["image"], **{k: v[0] for k, v in padded.items()}})
    return out


def stack_text(rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """The text [N, T, D] and text_mask [N, T] of what `examples` returned."""
    return {k: np.stack([row[k] for row in rows]) for k in ("text", "text_mask")}


def _dataset(config: Config, split: str, source: dict, shard_info, shuffle: bool):
    task = open_task(config)
    available = records.dataset_info(config.data.dir, task.source.name).num_examples
    if split not in available:
        allowed = ", ".join(available)
        raise UserError(f"data.task={config.data.task} has no split {split!r}; it has: {allowed}")
    source = task.source.at(**source, stores=config.stores, categories=config.data.categories)
    dataset = task.replace(source=source).get_dataset(
        sequence_length=None,
        split=split,
        shuffle=shuffle,
        seed=config.seed,
        shard_info=shard_info,
        num_epochs=1,  # a shuffled source is endless by itself
        try_in_mem_cache=False,
    )

    def shape(row):
        dims = zip(_text_keys(config), config.text.parts, strict=True)
        text = {key: tf.ensure_shape(row[key], (None, part.dim)) for key, part in dims}
        image = _fit(row["image"], config.full_size)
        if config.full_size > config.unet.image_size:
            image = _crop(image, row["position"] if shuffle else None, config)
        return {**row, "image": image, **text}

    options = tf.data.Options()
    # Finding out how many threads each stage wants took a quarter of the time that reading takes;
    # without, each may use them all.
    options.autotune.enabled = False
    return dataset.map(shape, tf.data.AUTOTUNE).with_options(options)


def _fit(image: tf.Tensor, size: int) -> tf.Tensor:
    """The centre square at the model's resolution; antialiased where it shrinks."""
    shape = tf.shape(image)
    side = tf.minimum(shape[0], shape[1])
    image = tf.image.resize_with_crop_or_pad(image, side, side)

    def shrink():
        small = tf.image.resize(image, (size, size), method="area")
        return tf.cast(tf.clip_by_value(tf.round(small), 0, 255), tf.uint8)

    tf.debugging.assert_greater_equal(side, size, TOO_SMALL)
    image = tf.cond(tf.equal(side, size), lambda: image, shrink)
    return tf.ensure_shape(image, (size, size, 3))


def _crop(image: tf.Tensor, position: tf.Tensor | None, config: Config) -> tf.Tensor:
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


def _numpy_batches(config: Config, dataset: tf.data.Dataset, size: int) -> Iterator[Batch]:
    keys = _text_keys(config)
    ragged = dataset.map(lambda r: {k: r[k] for k in ("image", *keys)})
    # Ragged until here: padding to the token limit multiplies the bytes an example by five.
    ragged = ragged.ragged_batch(size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    for rows in _guarded(config, iter(ragged)):
        captions = [_split(rows[key]) for key in keys]
        yield {"image": rows["image"].numpy(), **config.text.pad(*captions)}


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
