"""Checks that the files of a run are what it wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from imagen_jax.common import buckets
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import read_json
from imagen_jax.runs import checksums, exported
from imagen_jax.runs import workdir as runs


def problems(workdir: Path) -> Iterator[tuple[Path, str]]:
    """Yields each file or checkpoint of a run, and what is wrong with it: "" for nothing.

    Checkpoints and snapshots are compared with their checksums. Configs, metrics and pictures have
    none, so they are only read; the event files of TensorBoard are left out. The files of an
    exported model are compared with their hashes.
    """
    if (workdir / runs.CASCADE).exists():
        for stage in runs.stages_of([workdir]):
            yield from problems(Path(stage))
        return
    yield workdir / runs.CONFIG, _config_problem(workdir)
    if exported.is_exported(workdir):
        yield from exported.problems(workdir)
    if (metrics := workdir / runs.METRICS).exists():
        _, damaged = runs.parse_metrics(metrics.read_bytes())
        first = f"{len(damaged)} damaged line(s), first line {damaged[0]}" if damaged else ""
        yield metrics, first
    for name in (runs.CHECKPOINTS, runs.SNAPSHOTS):
        for folder in _checkpoints(workdir / name):
            yield folder, _checkpoint_problem(folder)
    for folder in (workdir / runs.SAMPLES, workdir / runs.EVALUATION):
        found = buckets.files_below(folder)
        for path in (p for p in found if p.suffix == ".png"):
            yield path, _picture_problem(path)
        for path in (p for p in found if p.suffix == ".json"):
            yield path, _json_problem(path)


def _checkpoints(folder: Path) -> list[Path]:
    found = [p for p in folder.glob("step_*") if p.name[5:].isdecimal()]
    if buckets.is_remote(folder):
        found = [p for p in found if (p / checksums.COMMITTED).exists()]
    steps = {int(p.name[5:]): p for p in found}
    return [steps[step] for step in sorted(steps)]


def _checkpoint_problem(folder: Path) -> str:
    try:
        return checksums.find_damage(folder)
    except FileNotFoundError:
        return f"{checksums.CHECKSUMS} is missing, so damage cannot be found"


def _config_problem(workdir: Path) -> str:
    try:
        runs.read_config(workdir)
    except UserError as e:
        return str(e)
    return ""


def _json_problem(path: Path) -> str:
    try:
        read_json(path)
    except UserError as e:
        return str(e)
    return ""


def _picture_problem(path: Path) -> str:
    try:
        with path.open("rb") as file, Image.open(file) as image:
            image.load()
    except Exception as e:  # decoders raise anything on a broken file
        return f"not a readable image ({type(e).__name__})"
    return ""
