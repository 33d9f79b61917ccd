"""Sweeps over settings of the sampler: their points, one table, and the paper's pictures.

    --sweep=guidance:1,2,4 --sweep=threshold:none,static,dynamic

has nine points. Every point draws the same prompts with the same seeds. Values per stage of a
cascade are joined by "/": guidance:1.35/8.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.common import html, pictures
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_json, write_text
from imagen_jax.evaluation.metric import Metric, Table, total, value_of

# What may be swept: the settings per stage of pipeline.settings, and two more. "ema" is the width
# of the weights' average, or "kept" for the one of training; "low_res" is what super-resolution
# enlarges: the images that the base model has drawn, or the true ones.
NUMBERS = ("guidance", "guidance_rescale", "steps", "aug_level", "ema")
WORDS = {"sampler": (), "spacing": (), "threshold": (), "low_res": ("drawn", "true")}
KEPT = "kept"
PROMPTS = 4  # prompts in the picture of a grid

Point = dict[str, str]  # a value for each name that is swept
Settings = dict[str, list[str]]  # name -> its values


def parse(specs: Sequence[str]) -> Settings:
    """Parses the values of --sweep, such as "guidance:1,2,4".

    Raises:
      UserError: a name is unknown or given twice, or a value is out of range.
    """
    found: Settings = {}
    for spec in specs:
        name, colon, values = spec.partition(":")
        allowed = ", ".join((*NUMBERS, *WORDS))
        if not colon or name not in (*NUMBERS, *WORDS):
            raise UserError(
                f"--sweep is {spec!r}; allowed: NAME:VALUE,VALUE, NAME one of {allowed}"
            )
        if name in found:
            raise UserError(f"--sweep has {name} twice; give all of its values at once")
        found[name] = parse_values(name, values.split(","), f"--sweep={name}")
    return found


def parse_values(name: str, values: Sequence[str], flag: str) -> list[str]:
    """Checks the values of a name; returns them in their shortest form.

    Raises:
      UserError: a value is out of range, or there are two equal ones.
    """
    found = [value.strip() for value in values]
    if name in NUMBERS:
        try:
            found = ["/".join(map(_number, value.split("/"))) for value in found]
        except ValueError as e:
            kept = f", or {KEPT}" if name == "ema" else ""
            shown = ",".join(values)
            raise UserError(f"{flag} is {shown!r}; allowed: numbers from 0 up{kept}") from e
    allowed = WORDS.get(name) or found
    if not all(found) or not set(found) <= set(allowed):
        raise UserError(f"{flag} is {','.join(values)!r}; allowed: {', '.join(allowed)}")
    if len(set(found)) < len(found):
        raise UserError(f"{flag} is {','.join(values)!r}; a value is there twice")
    return found


def _number(text: str) -> str:
    if text == KEPT:
        return text
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError(text)
    return f"{value:g}"


def points(settings: Settings) -> list[Point]:
    """Returns all combinations of the values, the last name changing fastest."""
    return [
        dict(zip(settings, values, strict=True)) for values in itertools.product(*settings.values())
    ]


def name_of(point: Point, settings: Settings) -> str:
    """Returns the name of a point: "guidance 2, EMA 0.05". Leaves out what all points share."""
    words = []
    for key, value in point.items():
        always = key == "guidance" or (key == "ema" and value != KEPT)
        if len(settings[key]) > 1 or always:
            words.append(f"{'EMA' if key == 'ema' else key.replace('_', ' ')} {value}")
    return ", ".join(words) or "config"


def write_table(
    folder: Path, columns: Mapping[str, Point], results: Mapping[str, Mapping[str, Table]]
) -> None:
    """Writes sweep.csv and sweep.json: a row per point, with every metric over all images.

    Args:
      columns: the points by name.
      results: metric -> column -> Table.
    """
    rows = [_row(name, point, results) for name, point in columns.items()]
    write_json(folder / "sweep.json", {"points": rows})
    header = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "sweep.csv", text.getvalue())


def _row(name: str, point: Point, results: Mapping[str, Mapping[str, Table]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, **point}
    for metric, tables in results.items():
        figures = total(tables[name]).items()
        row |= {f"{metric}.{key}": v for key, v in figures if isinstance(v, (int, float))}
    return row


def sections(
    folder: Path,
    columns: Mapping[str, Point],
    metrics: Mapping[str, Metric],
    results: Mapping[str, Mapping[str, Table]],
) -> list[str]:
    """Draws the pictures of a sweep; returns its parts of the report.

    Args:
      columns: the points by name.
      results: metric -> column -> Table.
    """
    if len(columns) < 2 or not metrics:
        return []
    keys = list(next(iter(columns.values())))
    header = [*(k.replace("_", " ") for k in keys), *metrics]
    rows = [
        [*point.values(), *(m.cell(total(results[n][name])) for n, m in metrics.items())]
        for name, point in columns.items()
    ]
    parts = [html.element("h2", "Sweep"), html.table(header, rows)]
    for path in _curves(folder, columns, results):
        parts.append(html.image(path))
    return parts


def _curves(
    folder: Path, columns: Mapping[str, Point], results: Mapping[str, Mapping[str, Table]]
) -> list[Path]:
    """Draws each metric against the first one over guidance; a single metric against guidance."""
    lines: dict[str, list[tuple[str, str]]] = {}
    several = {k for k, values in _values(columns).items() if len(set(values)) > 1}
    for name, point in columns.items():
        if "/" in (weight := point.get("guidance", "")) or not weight:
            continue
        rest = {k: v for k, v in point.items() if k != "guidance" and k in several}
        label = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in rest.items()) or "samples"
        lines.setdefault(label, []).append((weight, name))
    if not any(len(line) > 1 for line in lines.values()):
        return []
    first, *others = results
    paths = []
    for other in others or [""]:
        path = folder / (f"pareto_{first}_{other}.png" if other else f"{first}_over_guidance.png")
        xlabel, ylabel = (_label(results, other) if other else "guidance"), _label(results, first)
        axes_labels = {"xlabel": xlabel, "ylabel": ylabel, "yscale": "linear"}
        with pictures.chart(path, (5, 3.5), **axes_labels) as axes:
            for label, line in lines.items():
                ys = [_bounds(total(results[first][name])) for _, name in line]
                if other:
                    xs = [_bounds(total(results[other][name])) for _, name in line]
                else:
                    xs = [(float(weight), 0.0, 0.0) for weight, _ in line]
                _draw_line(axes, xs, ys, label)
                for (weight, _), x, y in zip(line, xs, ys, strict=True):
                    axes.annotate(weight, (x[0], y[0]), xytext=(3, 3), textcoords="offset points")
        paths.append(path)
    return paths


def _values(columns: Mapping[str, Point]) -> dict[str, list[str]]:
    """Returns the values of each name, in the order of the points."""
    keys = next(iter(columns.values()), {})
    return {key: [point[key] for point in columns.values()] for key in keys}


def _label(results: Mapping[str, Mapping[str, Table]], metric: str) -> str:
    table = next(iter(results[metric].values()))
    key, _ = value_of(total(table))
    return metric if key == "value" else f"{metric}: {key}"


def _bounds(row: Mapping[str, Any]) -> tuple[float, float, float]:
    """Returns a value and the lengths of its error bars."""
    _, value = value_of(row)
    low, high = row.get("low", value), row.get("high", value)
    return value, max(0.0, value - low), max(0.0, high - value)


def _draw_line(axes: Any, xs: Sequence[tuple], ys: Sequence[tuple], label: str) -> None:
    (x, x_down, x_up), (y, y_down, y_up) = zip(*xs, strict=True), zip(*ys, strict=True)
    bars = {"xerr": (x_down, x_up), "yerr": (y_down, y_up)}
    axes.errorbar(x, y, **bars, fmt="o-", ms=4, lw=1, elinewidth=0.5, label=label)


def write_grid(
    folder: Path, columns: Mapping[str, Point], images: Mapping[str, Any], captions: Sequence[str]
) -> Path | None:
    """Writes grid_<names>.png of the first prompts, if exactly two names have several values.

    The first name changes from left to right, the second from top to bottom, as in the paper's
    grid of guidance and thresholding.

    Args:
      images: column -> samples, uint8 [H, W, 3] each.
      captions: of the prompts.
    """
    values = _values(columns)
    several = [key for key in values if len(set(values[key])) > 1]
    if len(several) != 2:
        return None
    across, down = several
    order = sorted(columns, key=lambda name: values[down].index(columns[name][down]))
    width = len(set(values[across]))
    cells, words = [], []
    for i, caption in enumerate(captions[:PROMPTS]):
        for k, name in enumerate(order):
            cells.append(images[name][i])
            words.append(f"{caption}: {name}" if k == 0 else name)
    path = folder / f"grid_{across}_{down}.png"
    pictures.save(pictures.grid(np.stack(cells), words, columns=width), path)
    return path
