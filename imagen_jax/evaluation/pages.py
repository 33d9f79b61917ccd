"""Writes the pictures and the report of an evaluation, and prints its tables."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.common import html, pictures
from imagen_jax.config import Config
from imagen_jax.evaluation import published, report, sweep
from imagen_jax.evaluation.evaluating import Column, Evaluation
from imagen_jax.evaluation.metric import Example, Metric, Table
from imagen_jax.evaluation.report import Sampled

SHOWN = 32  # samples per grid
JUDGED, JUDGED_PIXELS = 512, 2**27  # samples among which the report finds the best and the worst

# (image, example of a scene) -> its claims in words, and whether each holds.
Verdicts = Callable[[np.ndarray, Example], list[tuple[str, bool]]]


def write(
    job: Evaluation,
    config: Config,
    columns: Mapping[str, Column],
    metrics: Mapping[str, Metric],
    results: Mapping[str, Mapping[str, Table]],
    protocols: Mapping[str, Mapping[str, Any]],
    verdicts: Verdicts,
    page: Path,
) -> list[Path]:
    """Writes the pictures and the report, prints the tables of the metrics, returns the files.

    Args:
      config: of the last run.
      columns: the samples of every point.
      metrics, results: by the metric's name.
      protocols: of the metrics of images.
      page: the report.
    """
    files = []
    for name, column in columns.items():
        words = name.replace(", ", "_").replace(" ", "_").replace("/", "-")
        files.append(job.out / f"samples_{words}.png")
        grid = pictures.grid(column.images[:SHOWN], job.captions[:SHOWN], columns=8)
        pictures.save(grid, files[-1])
    more = _sections(job, columns, metrics, results, protocols)
    measured = [report.Measured(metric, results[name]) for name, metric in metrics.items()]
    sampled = _sampled(job, config, columns, verdicts)
    report.write(job.workdirs[-1], sampled, measured, more, page, job.out)
    for part in measured:
        print(report.text_table(part))
    return [*files, page]


def _sections(
    job: Evaluation,
    columns: Mapping[str, Column],
    metrics: Mapping[str, Metric],
    results: Mapping[str, Mapping[str, Table]],
    protocols: Mapping[str, Mapping[str, Any]],
) -> list[str]:
    """Returns the parts of the report on the sweep, published figures and protocols."""
    points = {name: column.point for name, column in columns.items()}
    of_images = {name: metrics[name] for name in protocols}
    parts = []
    if len(columns) > 1:
        parts += sweep.sections(job.out, points, of_images, results)
        sweep.write_table(job.out, points, {name: results[name] for name in of_images})
        images = {name: column.images for name, column in columns.items()}
        if path := sweep.write_grid(job.out, points, images, job.captions):
            parts.append(html.image(path))
    if "fid" in of_images:
        name = job.workdirs[-1].name
        parts += published.fid_section(name, results["fid"], protocols["fid"])
    for name, shared in protocols.items():
        prompts = {k: v for k, v in shared["prompts"].items() if k != "ids"}
        drawn = {c: column.protocol for c, column in columns.items()}
        text = json.dumps({**shared, "prompts": prompts, "columns": drawn}, indent=1)
        parts.append(html.details(f"Protocol of {name}", html.element("pre", text)))
    return parts


def _sampled(
    job: Evaluation, config: Config, columns: Mapping[str, Column], verdicts: Verdicts
) -> list[Sampled]:
    """Joins captions with their images and, for scenes, the verdicts on the image of one column.

    That column is the one with the guidance weight nearest to the config's.
    """
    if not columns:
        return []
    weight = config.sampling.guidance_weight

    def distance(name: str) -> float:
        guidance = columns[name].point.get("guidance", "")
        return abs(float(guidance.split("/")[-1]) - weight) if guidance else 0.0

    judged = min(columns, key=distance)
    examples, num = job.suite.examples, len(job.captions)
    scenes = all(e.get("scene") for e in job.light)
    side = len(columns[judged].images[0])
    most = max(report.SAMPLES, min(JUDGED, JUDGED_PIXELS // side**2)) if scenes else report.SAMPLES
    found = []
    for i in range(min(num, most)):
        kept = columns if i < report.SAMPLES else [judged]
        images = {c: columns[c].images[i] for c in kept}
        if job.has_images:
            images[report.TRUE] = examples[i]["image"]
        claims = {judged: verdicts(images[judged], job.light[i])} if scenes else {}
        found.append(Sampled(job.captions[i], images, claims))
    return found
