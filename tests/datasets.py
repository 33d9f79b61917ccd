"""Datasets written by hand: tfds's files without tfds, so a test can put anything into them."""

import io
import json
from pathlib import Path

import numpy as np
import tensorflow as tf
from conftest import FakeEncoder
from PIL import Image

from data_pipelines.embeddings import encoding
from data_pipelines.embeddings.caption_lists import Found
from data_pipelines.embeddings.shards import finish
from data_pipelines.embeddings.store import create_store
from data_pipelines.records.record_files import write_offsets
from imagen_jax.text.encoder import Batch


def picture(number, side=32, kind="PNG"):
    """An encoded image that differs from those of other numbers."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def record(number, prefix="r", captions=None, embedded=True, **changes):
    """The features of a record, as bytes and integers."""
    captions = captions or [f"{prefix} {number}"]
    fields = {"id": f"{prefix}{number}".encode(), "image": picture(number)}
    if len(captions) == 1:
        fields["caption"] = captions[0].encode()
    else:
        fields["captions"] = [caption.encode() for caption in captions]
    if embedded:
        [embedding] = FakeEncoder().encode(captions[:1])
        fields |= {"text_embeddings": embedding.tobytes(), "text_tokens": len(embedding)}
    return fields | {"category": b"", "scene": b""} | changes


def example(fields):
    """Serializes a tf.train.Example."""
    features = {}
    for key, value in fields.items():
        if isinstance(value, int):
            features[key] = tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        else:
            values = value if isinstance(value, list) else [value]
            features[key] = tf.train.Feature(bytes_list=tf.train.BytesList(value=values))
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write(data_dir, name, records, shard=16, offsets=True, embedded=True):
    """Writes a dataset whose train and validation have the same records; returns its folder."""
    folder = Path(data_dir) / name / "1.0.0"
    folder.mkdir(parents=True)
    parts = [records[i : i + shard] for i in range(0, len(records), shard)]
    splits = []
    for split in ("train", "validation"):
        for i, part in enumerate(parts):
            path = str(folder / f"{name}-{split}.tfrecord-{i:05d}-of-{len(parts):05d}")
            with tf.io.TFRecordWriter(path) as writer:
                for fields in part:
                    writer.write(example(fields))
            if offsets:
                write_offsets(path)
        splits.append({"name": split, "shardLengths": [str(len(part)) for part in parts]})
    info = {"name": name, "fileFormat": "tfrecord", "splits": splits}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    identity = FakeEncoder().identity if embedded else None
    (folder / "metadata.json").write_text(json.dumps({"text_identity": identity, "settings": {}}))
    return folder


class Encoder(FakeEncoder):
    """The fake encoder, one caption per batch."""

    def batches(self, captions):
        for caption in captions:
            yield Batch(dict(zip([caption], self.encode([caption]), strict=True)), 8)


def write_store(path, captions, shards=2):
    """Writes a store of the fake encoder's embeddings; returns its path."""
    store = create_store(str(path), Encoder().identity, "bfloat16", shards)
    found = [Found("list", i, caption) for i, caption in enumerate(captions)]
    encoding.encode(store, encoding.assign(store, found, 0, 1), Encoder())
    finish(store)
    return str(path)
