"""The records of a run as a tf.data pipeline: opened, resized and cropped, but not padded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import seqio
import tensorflow as tf

from data_pipelines.reading import check, tasks
from data_pipelines.records import prepared
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config

# Accelerators belong to JAX.
tf.config.set_visible_devices([], "GPU")

TOO_SMALL = "an image is smaller than config.model.image_size (or config.data.image_size, if set)"


def source_of(config: Config, split: str, start: int = 0, block: int = 1) -> tasks.RecordsSource:
    """Returns the source of the config's records, after checking that the split exists."""
    source = seqio.get_mixture_or_task(config.data.task).source
    info = prepared.dataset_info(config.data.dir, source.name)
    check.check_split(config.data.task, info.num_examples, split)
    return source.at(
        config.data.dir,
        start=start,
        block=block,
        stores=config.stores,
        categories=config.data.categories,
    )


def rows_of(
    config: Config,
    source: tasks.RecordsSource,
    split: str,
    info: seqio.ShardInfo | None = None,
    shuffle: bool = True,
    strings: Sequence[str] = (),
) -> tf.data.Dataset:
    """Yields image uint8 [S, S, 3] with S = full_size, embeddings, position and `strings`."""
    task = seqio.get_mixture_or_task(config.data.task).replace(source=source)
    dataset = task.get_dataset(
        sequence_length=None,
        split=split,
        shuffle=shuffle,
        seed=config.seed,
        shard_info=info,
        num_epochs=1,  # a shuffled source is already endless
        try_in_mem_cache=False,
        trim_output_features=False,  # trimming would add a stage for nothing
    )
    keys = ("position", *strings)

    def shape(row):
        dims = zip(text_keys(config), config.text.parts, strict=True)
        text = {key: tf.ensure_shape(row[key], (None, part.dim)) for key, part in dims}
        image = _fit(row["image"], config.full_size)
        return {"image": image, **text, **{key: row[key] for key in keys}}

    options = tf.data.Options()
    # Tuning the threads of each stage took a quarter of the reading time. Without it, every stage
    # may use all threads.
    options.autotune.enabled = False
    return dataset.map(shape, tf.data.AUTOTUNE).with_options(options)


def _fit(image: tf.Tensor, size: int) -> tf.Tensor:
    """Shrinks the center square to `size` by an area filter, which antialiases; never enlarges."""
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


def crop(config: Config, image: tf.Tensor, position: tf.Tensor | None = None) -> tf.Tensor:
    """Crops a square of model.image_size, centered or at a corner random in seed and position.

    The corner is a multiple of the upscaling factor, so shrinking the crop gives exactly the crop
    of the shrunk image. Super-resolution thus trains on the kind of input it gets in sampling.

    Args:
      position: the example's global position; None for a centered crop.
    """
    size, step = config.unet.image_size, config.upscale
    places = (config.full_size - size) // step + 1
    if position is None:
        corner = tf.fill([2], places // 2)
    else:
        seed = tf.stack([tf.constant(config.seed, tf.int64), position])
        corner = tf.random.stateless_uniform([2], seed, maxval=places, dtype=tf.int32)
    return tf.image.crop_to_bounding_box(image, *tf.unstack(corner * step), size, size)


def text_keys(config: Config) -> list[str]:
    return tasks.embedding_keys(len(config.text.parts))


def guarded(config: Config, rows: Iterator) -> Iterator:
    """Turns a TensorFlow error while reading into a one-line UserError."""
    try:
        yield from rows
    except tf.errors.OpError as e:
        first = e.message.splitlines()[0]
        raise UserError(f"reading data.task={config.data.task} failed: {first}") from e
