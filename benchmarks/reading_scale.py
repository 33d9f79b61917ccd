"""Measures what a dataset of a billion records costs to open, resume and read: time and memory.

    python -m benchmarks.reading_scale

writes one TFRecord file and makes it appear as --shards files by hard links, so that the dataset
takes little disk. It then reads as training does, in the order of a single host, for both orders.
The memory is this process's growth, with the encoded records of a window in it.
"""

from __future__ import annotations

import io
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from PIL import Image

from imagen_jax.common import cli, typed_config
from imagen_jax.config import Config, parse

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_integer("shards", 10_000, "Number of files.", lower_bound=1)
    flags.DEFINE_integer("records", 100_000, "Records of each file.", lower_bound=1)
    flags.DEFINE_list("windows", ["0", "16384"], "Values of config.data.shuffle_window.")
    flags.DEFINE_integer("batches", 20, "Batches to read from each position.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 256, "Examples of a batch.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints one line of JSON for each order and position."""
    del argv
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), FLAGS.shards, FLAGS.records)
        total = FLAGS.shards * FLAGS.records
        for window in map(int, FLAGS.windows):
            config = config_of(folder, window, FLAGS.batch_size)
            for position in (0, 5 * total + total // 3):
                before = memory()
                start = time.perf_counter()
                reader = Reader(config)
                batches = reader.train_batches(position)
                next(batches)
                ready = time.perf_counter() - start
                start = time.perf_counter()
                for _ in range(FLAGS.batches):
                    next(batches)
                rate = FLAGS.batches * FLAGS.batch_size / (time.perf_counter() - start)
                figures = {
                    "records": total,
                    "window": window,
                    "position": position,
                    "seconds_to_first_batch": round(ready, 3),
                    "examples_per_s": round(rate, 1),
                    "mib": round((memory() - before) / 2**20, 1),
                    "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10),
                }
                print(json.dumps(figures), flush=True)
                batches.close()


def memory() -> int:
    """Returns the resident memory of this process in bytes, without mapped files."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def write(folder: Path, shards: int, records: int) -> None:
    """Writes the dataset "folder": equal records, one file under `shards` names."""
    from tensorflow.train import BytesList, Example, Feature, Features, Int64List

    from data_pipelines.records.record_files import write_offsets

    image = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize((64, 64)).save(image, "JPEG")
    values = {"id": b"id", "image": image.getvalue(), "caption": b"a caption"}
    values |= {"text_embeddings": b"\1" * 32}
    features = {k: Feature(bytes_list=BytesList(value=[v])) for k, v in values.items()}
    features["text_tokens"] = Feature(int64_list=Int64List(value=[2]))
    data = Example(features=Features(feature=features)).SerializeToString()
    framed = frame(data)
    path = folder / "folder" / "1.0.0"
    path.mkdir(parents=True)
    name = "folder-train.tfrecord-{:05d}-of-" + f"{shards:05d}"
    first = path / name.format(0)
    first.write_bytes(framed * records)
    write_offsets(str(first))
    for number in range(1, shards):
        for suffix in ("", ".offsets.npy"):
            os.link(f"{first}{suffix}", f"{path / name.format(number)}{suffix}")
    splits = [{"name": "train", "shardLengths": [str(records)] * shards}]
    info = {"name": "folder", "fileFormat": "tfrecord", "splits": splits}
    (path / "dataset_info.json").write_text(json.dumps(info))
    identity = {"encoder": "byte-tiny", "dim": 8, "max_tokens": 4}
    metadata = {"text_identity": identity, "settings": {}}
    (path / "metadata.json").write_text(json.dumps(metadata))


def frame(data: bytes) -> bytes:
    """Returns a record with its length and checksums, by TensorFlow's own writer."""
    import tensorflow as tf

    with tempfile.NamedTemporaryFile() as file:
        with tf.io.TFRecordWriter(file.name) as writer:
            writer.write(data)
        return Path(file.name).read_bytes()


def config_of(folder: str, window: int, batch_size: int) -> Config:
    """Returns a config that reads the dataset at 64 pixels."""
    values: dict[str, Any] = typed_config.load("configs/folder.py")
    values.update(batch_size=batch_size, eval_every=0, sample_every=0)
    values["text"] = {"encoder": "byte-tiny", "dim": 8, "max_tokens": 4}
    values["data"].update(dir=folder, shuffle_window=window)
    return parse(values)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
