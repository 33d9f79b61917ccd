"""Makes tiny sources and runs ingest on them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from data_pipelines.ingestion import run, workers
from data_pipelines.ingestion.items import Columns
from data_pipelines.ingestion.options import Options
from data_pipelines.records import dataset

DATE = "2026-01-02"


def picture(number, size=(20, 16), mode="RGB"):
    """An image that differs from those of other numbers."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
    return small.resize(size, Image.Resampling.BICUBIC).convert(mode)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def jpeg(number, size=(20, 16)):
    return encoded(picture(number, size), "JPEG", quality=95)


def write_tar(path, files):
    """Writes {name: bytes, text or JSON-able} to a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            data = json.dumps(data) if isinstance(data, (dict, list)) else data
            data = data.encode() if isinstance(data, str) else data
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_tars(folder, num, per_tar):
    """Writes tars of distinct images as img2dataset does."""
    for t in range(num):
        files = {}
        for i in range(t * per_tar, (t + 1) * per_tar):
            files |= {f"{i:09d}.jpg": jpeg(i), f"{i:09d}.txt": f"picture number {i}"}
            files[f"{i:09d}.json"] = {"caption": f"picture number {i}", "punsafe": i / 1000}
        write_tar(folder / f"{t:05d}.tar", files)


def job(data_dir, *specs, columns=None, embed=None, **options):
    fields = {"encoder": "", "resolution": 16, "validation_fraction": 0.0, **options}
    keys = ("overwrite", "skip_damaged", "name")
    more = {key: fields.pop(key) for key in keys if key in fields}
    more = {"name": "folder", "date": DATE, "embed": embed, **more}
    return run.Job(
        specs=[str(spec) for spec in specs],
        data_dir=str(data_dir),
        options=Options(**fields),
        columns=columns or Columns(),
        **more,
    )


def ingest(data_dir, *specs, **options):
    """Ingests in this process; returns the dataset's folder."""
    return run.run(job(data_dir, *specs, **options), workers.local(1))


def rows(folder, split="train"):
    """Reads a dataset with tfds: {id: record}."""
    read = tfds.builder_from_directory(str(folder)).as_dataset(split=split)
    return {row["id"].decode(): row for row in read.as_numpy_iterator()}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def report(folder):
    return json.loads((folder / dataset.REPORT).read_text())


def files(folder):
    """The bytes of every file, by name."""
    folder = Path(folder)
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}
