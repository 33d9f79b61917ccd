"""Writes the samples of a job as PNG files, and resumes where an interrupted call stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from imagen_jax.common import cli, pictures
from imagen_jax.common.files import make_folder, write_json
from imagen_jax.pipeline.cascade import Cascade, Job
from imagen_jax.pipeline.prompts import Request
from imagen_jax.pipeline.trained import TrainedStage

GRID = "grid.png"


def write_samples(
    cascade: Cascade, job: Job, out: Path, *, columns: int, all_stages: bool = False
) -> None:
    """Samples the images that a folder lacks; writes them, samples.json and GRID.

    An image is missing unless its metadata records the same request, settings and checkpoints.

    Args:
      out: the folder; created if missing.
      columns: samples per row of the grid.
      all_stages: also keep the other stages' images, in folders named by their size.

    Raises:
      UserError: the folder cannot be written, or a prompt is too long.
    """
    make_folder(out, "out")
    records = _records(cascade, job)
    names = [f"{i:05d}.png" for i in range(len(records))]
    folders = [out / f"{s.size}" for s in cascade.stages[:-1]] if all_stages else []
    folders.append(out)
    missing = [
        i
        for i, name in enumerate(names)
        if any(_record_of(folder / name) != records[i] for folder in folders)
    ]
    if len(missing) < len(names):
        cli.log.info("%d of %d images exist already", len(names) - len(missing), len(names))
    for rows, samples in cascade.sample(job, missing):
        for folder, images in zip(folders, samples[-len(folders) :], strict=True):
            for i, image in zip(rows, images, strict=True):
                _write(image, folder / names[i], job.requests[i], records[i])
    listed = [{"file": n, **json.loads(r)} for n, r in zip(names, records, strict=True)]
    write_json(out / "samples.json", listed)
    shown = names[: pictures.MOST_ON_A_SHEET]
    sheet = np.stack([_side_by_side([folder / name for folder in folders]) for name in shown])
    captions = [r.prompt for r in job.requests[: len(shown)]]
    pictures.save(pictures.grid(sheet, captions, columns=columns), out / GRID)


def _records(cascade: Cascade, job: Job) -> list[str]:
    """Returns what each sample depends on, as JSON: request, checkpoints, settings and inputs."""
    stages = {
        stage.name: {"step": stage.step, **_weights(stage), **dataclasses.asdict(sampler)}
        for stage, sampler in zip(cascade.stages, job.samplers, strict=True)
    }
    common = {"stages": stages}
    if job.inputs:
        hashes = {k: hashlib.sha256(v.tobytes()).hexdigest() for k, v in job.inputs.items()}
        common["inputs_sha256"] = hashes
    return [json.dumps({**dataclasses.asdict(r), **common}) for r in job.requests]


def _weights(stage: TrainedStage) -> dict[str, Any]:
    """Returns what tells the weights from others of the same step; nothing for a run's own EMA."""
    average = {} if stage.ema is None else {"ema": stage.ema}
    return average | ({"export_sha256": stage.exported["sha256"]} if stage.exported else {})


def _side_by_side(paths: list[Path]) -> np.ndarray:
    """Joins images in a row, enlarged to the size of the last one without smoothing."""
    images = [Image.open(path) for path in paths]
    size = images[-1].size
    return np.hstack([np.asarray(i.resize(size, Image.Resampling.NEAREST)) for i in images])


def _record_of(path: Path) -> str | None:
    """Returns the record in the metadata of an image; None if there is no readable image."""
    try:
        with Image.open(path) as image:
            return image.info.get("request")
    except OSError:
        return None


def _write(image: np.ndarray, path: Path, request: Request, record: str) -> None:
    info = PngInfo()
    info.add_itxt("prompt", request.prompt)
    info.add_text("seed", str(request.seed))
    info.add_itxt("request", record)
    pictures.save(Image.fromarray(image), path, info)
