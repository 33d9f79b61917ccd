"""Compares the reader with a torch DataLoader, the webdataset package and grain on the same images.

    pip install torch webdataset grain
    python -m benchmarks.reading --side=256 --size=64

All make the same batches: JPEGs of --side cropped and shrunk to --size by an area filter, and
embeddings of 8 to 64 tokens by --dim, padded to 128. The others decode with Pillow in one worker
process per core. The reader reads TFRecords, webdataset a tar, torch and grain a folder of files.
They take turns, each with new workers. A tool that is not installed is left out. The first rate is
by the CPU time of all processes, which other work on the machine changes less than the second.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import psutil
from absl import flags
from PIL import Image

from imagen_jax.common import cli, typed_config
from imagen_jax.config import parse

FLAGS = flags.FLAGS
TOKENS = 128


def define_flags() -> None:
    flags.DEFINE_integer("side", 256, "Side of the stored JPEGs.", lower_bound=8)
    flags.DEFINE_integer("size", 64, "Side of the images in a batch.", lower_bound=8)
    flags.DEFINE_integer("dim", 4096, "Width of the embeddings.", lower_bound=1)
    flags.DEFINE_integer("images", 256, "Number of images.", lower_bound=32)
    flags.DEFINE_integer("batch_size", 32, "Examples of a batch.", lower_bound=1)
    flags.DEFINE_integer("batches", 16, "Batches per turn.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Number of turns of each tool.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Prints a Markdown table."""
    del argv
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        rates: dict[str, list[tuple[float, float]]] = {}
        for turn in range(FLAGS.rounds):
            for name in sorted(TOOLS, reverse=turn % 2 == 1):
                with contextlib.suppress(ImportError):
                    found = measure(TOOLS[name](Path(folder)))
                    rates.setdefault(name, []).append(found)
                gc.collect()  # stops the workers
    print(f"\n{FLAGS.side} -> {FLAGS.size}, {len(os.sched_getaffinity(0))} core(s)\n")
    print("| tool | examples per CPU second | examples/s |\n|---|---|---|")
    for name, found in rates.items():
        cpu, wall = map(statistics.median, zip(*found, strict=True))
        print(f"| {name} | {cpu:,.0f} | {wall:,.0f} |")


def measure(batches: Iterator[Any]) -> tuple[float, float]:
    """Returns examples per CPU second and per second, after two batches to warm up."""
    for _ in range(2):
        batch = next(batches)
    shapes = [np.shape(batch[key]) for key in ("image", "text", "text_mask")]
    size, b = FLAGS.size, FLAGS.batch_size
    assert shapes == [(b, size, size, 3), (b, TOKENS, FLAGS.dim), (b, TOKENS)], shapes
    wall, cpu = time.perf_counter(), cpu_seconds()
    for _ in range(FLAGS.batches):
        next(batches)
    num = FLAGS.batches * b
    return num / (cpu_seconds() - cpu), num / (time.perf_counter() - wall)


def cpu_seconds() -> float:
    """Returns the CPU time of this process and its children."""
    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(t.user + t.system for t in times)


def write(folder: Path) -> None:
    """Writes the same images and embeddings as TFRecords, as a tar and as files."""
    from skimage import data
    from tensorflow import io as tf_io
    from tensorflow.train import BytesList, Example, Feature, Features, Int64List

    rng = np.random.default_rng(0)
    photos = [Image.fromarray(photo()) for photo in (data.astronaut, data.coffee, data.chelsea)]
    records = folder / "folder" / "1.0.0"
    for path in (records, folder / "files"):
        path.mkdir(parents=True)
    name = "folder-train.tfrecord-00000-of-00001"
    with (
        tf_io.TFRecordWriter(str(records / name)) as writer,
        tarfile.open(folder / "all.tar", "w") as tar,
    ):
        for i in range(FLAGS.images):
            photo = photos[i % len(photos)]
            side = int(rng.integers(200, 300))
            left, top = (int(rng.integers(n - side + 1)) for n in photo.size)
            part = photo.crop((left, top, left + side, top + side))
            buffer = io.BytesIO()
            part.resize((FLAGS.side, FLAGS.side), Image.Resampling.LANCZOS).save(
                buffer, "JPEG", quality=90
            )
            tokens = int(rng.integers(8, 65))
            text = rng.integers(0, 2**14, (tokens, FLAGS.dim)).astype(np.uint16).tobytes()
            values = {"id": b"%d" % i, "image": buffer.getvalue(), "caption": b"a caption"}
            values["text_embeddings"] = text
            features = {k: Feature(bytes_list=BytesList(value=[v])) for k, v in values.items()}
            features["text_tokens"] = Feature(int64_list=Int64List(value=[tokens]))
            writer.write(Example(features=Features(feature=features)).SerializeToString())
            for suffix, content in (("jpg", values["image"]), ("bin", text)):
                info = tarfile.TarInfo(f"{i:06d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
                (folder / "files" / info.name).write_bytes(content)
    splits = [{"name": "train", "shardLengths": [str(FLAGS.images)]}]
    info = {"name": "folder", "fileFormat": "tfrecord", "splits": splits}
    (records / "dataset_info.json").write_text(json.dumps(info))
    identity = {"encoder": "byte-tiny", "dim": FLAGS.dim, "max_tokens": TOKENS}
    metadata = {"text_identity": identity, "settings": {}}
    (records / "metadata.json").write_text(json.dumps(metadata))


def read_with_this(folder: Path) -> Iterator[Any]:
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    values = typed_config.load("configs/folder.py")
    values.update(batch_size=FLAGS.batch_size, eval_every=0, sample_every=0)
    values["text"] = {"encoder": "byte-tiny", "dim": FLAGS.dim, "max_tokens": TOKENS}
    values["data"]["dir"] = str(folder)
    values["model"] |= {"image_size": FLAGS.size, "attention_resolutions": ()}
    return Reader(parse(values)).train_batches(0)


def with_torch(folder: Path) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    files, dim, size = Files(folder / "files"), FLAGS.dim, FLAGS.size
    make = functools.partial(collate_tensors, dim=dim, size=size)
    options = {"batch_size": FLAGS.batch_size, "shuffle": True, "drop_last": True}
    workers = len(os.sched_getaffinity(0))
    loader = DataLoader(
        files, **options, collate_fn=make, num_workers=workers, persistent_workers=True
    )
    return endless(loader)


def with_webdataset(folder: Path) -> Iterator[Any]:
    import webdataset
    from torch.utils.data import DataLoader

    make = functools.partial(collate_tensors, dim=FLAGS.dim, size=FLAGS.size)
    samples = webdataset.WebDataset(str(folder / "all.tar"), shardshuffle=False, empty_check=False)
    samples = samples.shuffle(100).to_tuple("jpg", "bin")
    samples = samples.batched(FLAGS.batch_size, collation_fn=make, partial=False)
    loader = DataLoader(samples, batch_size=None, num_workers=1, persistent_workers=True)
    return endless(loader)


def with_grain(folder: Path) -> Iterator[Any]:
    import grain

    files = Files(folder / "files")
    make = functools.partial(collate, dim=FLAGS.dim, size=FLAGS.size)
    data = grain.MapDataset.source(files).seed(0).shuffle().repeat()
    data = data.batch(FLAGS.batch_size, drop_remainder=True, batch_fn=make).to_iter_dataset()
    workers = len(os.sched_getaffinity(0))
    return iter(data.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))


TOOLS: dict[str, Callable[[Path], Iterator[Any]]] = {
    "this project": read_with_this,
    "torch DataLoader": with_torch,
    "webdataset": with_webdataset,
    "grain": with_grain,
}


class Files:
    """The images and embeddings of a folder, as bytes by index."""

    def __init__(self, folder: Path):
        self._paths = sorted(folder.glob("*.jpg"))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> tuple[bytes, bytes]:
        path = self._paths[i]
        return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def collate(rows: Any, dim: int, size: int) -> dict[str, np.ndarray]:
    """Decodes, shrinks and pads as one would with Pillow and NumPy."""
    images = np.empty((len(rows), size, size, 3), np.uint8)
    text = np.zeros((len(rows), TOKENS, dim), np.uint16)
    mask = np.zeros((len(rows), TOKENS), bool)
    for i, (jpeg, embedding) in enumerate(rows):
        image = Image.open(io.BytesIO(jpeg)).convert("RGB")
        images[i] = np.asarray(image.resize((size, size), Image.Resampling.BOX))
        values = np.frombuffer(embedding, np.uint16).reshape(-1, dim)
        text[i, : len(values)], mask[i, : len(values)] = values, True
    return {"image": images, "text": text.view(ml_dtypes.bfloat16), "text_mask": mask}


def collate_tensors(rows: Any, dim: int, size: int) -> dict[str, Any]:
    """Does the same for torch, whose workers hand over tensors in shared memory."""
    import torch

    batch = collate(rows, dim, size)
    batch["text"] = batch["text"].view(np.uint16)
    return {key: torch.from_numpy(values) for key, values in batch.items()}


def endless(loader: Any) -> Iterator[Any]:
    """Repeats the epochs of a loader."""
    while True:
        yield from loader


if __name__ == "__main__":
    define_flags()
    cli.run(main)
