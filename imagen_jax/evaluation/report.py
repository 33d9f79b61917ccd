"""The HTML report of a run, one self-contained file that a phone shows too.

It has the metrics, their protocol, samples with the verdict on each claim, the sample grids of the
training, the losses against time, the config, and the commands to go on with.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from imagen_jax.common import html, pictures
from imagen_jax.common.files import write_text
from imagen_jax.evaluation.metric import Metric, Row, Table
from imagen_jax.evaluation.protocol import TRUE
from imagen_jax.runs import workdir as runs

MOST_GRIDS = 10  # sample grids of the training that the page shows
EXTREMES = 6  # best and worst samples
SAMPLES = 12  # captions whose samples are shown in several columns
COLUMNS = 5  # columns that a table by group, or a caption's row of samples, shows


class Measured(NamedTuple):
    """A metric and its tables by column: a point of the sweep, such as "guidance 2", or TRUE."""

    metric: Metric
    tables: dict[str, Table]


class Sampled(NamedTuple):
    """A caption and its images.

    Attributes:
      caption: the caption.
      images: uint8 [H, W, 3] by column, as in Measured.
      claims: for each column that was judged, the caption's claims in words and whether the image
        satisfies each.
    """

    caption: str
    images: dict[str, np.ndarray]
    claims: dict[str, list[tuple[str, bool]]]


def write(
    workdir: Path,
    samples: Sequence[Sampled],
    results: Sequence[Measured],
    more: Sequence[str] = (),
    path: Path | None = None,
    folder: Path | None = None,
) -> Path:
    """Writes the report of a run and returns its path.

    Args:
      samples: the captions to show.
      results: the metrics, in the order of display.
      more: further parts as HTML, below the metrics.
      path: the file (default: workdir/report.html).
      folder: folder of its loss curve (default: workdir/evaluation).
    """
    config = runs.read_config(workdir)
    lines = runs.read_metrics(workdir)
    parts = [
        html.element("p", _summary(lines)),
        *(_metric(measured) for measured in results),
        *more,
        *_extremes(samples),
        *_first(samples),
        *_training(workdir),
        *_losses(lines, config.loss_label, folder or workdir / runs.EVALUATION),
        html.element("h2", "Go on"),
        html.element("p", _CONTINUE),
        html.element("pre", "\n".join(commands(workdir))),
        html.element("h2", "Config"),
        html.details(runs.CONFIG, html.element("pre", (workdir / runs.CONFIG).read_text())),
    ]
    path = path or workdir / runs.REPORT
    write_text(path, html.page(workdir.name, *parts))
    return path


def _summary(lines: list[dict]) -> str:
    train = [m for m in lines if "loss" in m]
    if not train:
        return "The run has logged no loss."
    seconds, speed = _clock(lines)[-1][1], train[-1].get("images_per_s")
    words = [f"Step {train[-1]['step']:,}", f"loss {train[-1]['loss']:.4f}"]
    words += [f"{seconds / 60:.1f} minutes of training"] if seconds else []
    words += [f"{speed:.1f} images/s"] if speed else []
    return ", ".join(words) + "."


def _metric(measured: Measured) -> str:
    header, rows = _columns(measured, _cell)
    true = TRUE in measured.tables
    note = measured.metric.note + (" The last column has the true images." if true else "")
    return (
        html.element("h2", measured.metric.title)
        + html.stacking_table(header, rows)
        + html.element("p", note)
    )


def _cell(metric: Metric, row: Row) -> str:
    bar = html.interval(row["fully"], row["low"], row["high"]) if "fully" in row else ""
    return escape(metric.cell(row)) + bar


def _extremes(samples: Sequence[Sampled]) -> list[str]:
    """Returns the best and the worst samples of the column that was judged, if any was."""
    column = next((c for s in samples for c in s.claims if c != TRUE), None)
    if column is None:
        return []
    judged = [s for s in samples if s.claims.get(column)]
    judged.sort(key=lambda s: -np.mean([ok for _, ok in s.claims[column]]))
    num = min(EXTREMES, len(judged) // 2)
    parts = []
    for title, chosen in (("Best", judged[:num]), ("Worst", judged[len(judged) - num :][::-1])):
        cards = [_card(s, (column, TRUE), s.claims[column]) for s in chosen]
        heading = html.element("h2", f"{title} at {column}")
        parts.append(heading + html.wrap("div", "cards", *cards))
    return parts if num else []


def _first(samples: Sequence[Sampled]) -> list[str]:
    cards = [_card(s, shown(list(s.images))) for s in samples[:SAMPLES]]
    if not cards:
        return []
    return [html.element("h2", "The first captions") + html.wrap("div", "cards", *cards)]


def shown(columns: Sequence[str]) -> list[str]:
    """Returns the columns that there is room for, evenly chosen, and TRUE if it is one."""
    drawn = [c for c in columns if c != TRUE]
    at = np.unique(np.linspace(0, len(drawn) - 1, min(COLUMNS, len(drawn))).round().astype(int))
    return [drawn[i] for i in at] + ([TRUE] if TRUE in columns else [])


def _card(sampled: Sampled, columns: Sequence[str], claims=()) -> str:
    figures = [
        html.wrap(
            "figure", "",
            html.picture(sampled.images[c], f"{sampled.caption}, {_name(c)}", 192),
            html.element("figcaption", _name(c)),
        )
        for c in columns if c in sampled.images
    ]  # fmt: skip
    verdicts = [html.element("li", words, "yes" if ok else "no") for words, ok in claims]
    return html.wrap(
        "div",
        "card",
        html.wrap("div", "row", *figures),
        html.element("p", sampled.caption),
        html.wrap("ul", "claims", *verdicts) if verdicts else "",
    )


def _training(workdir: Path) -> list[str]:
    """Returns the sample grids of the training with a slider, evenly chosen if there are many."""
    found = sorted((workdir / runs.SAMPLES).glob("step_*.png"))
    if not found:
        return []
    at = np.unique(np.linspace(0, len(found) - 1, min(MOST_GRIDS, len(found))).round().astype(int))
    grids = []
    for path in (found[i] for i in at):
        with path.open("rb") as file, Image.open(file) as grid:
            grids.append(html.picture(grid, f"step {int(path.stem.split('_')[1]):,}", 560))
    return [html.element("h2", "Samples during training") + html.slider(grids)]


def _losses(lines: list[dict], label: str, folder: Path) -> list[str]:
    """Draws the losses against training time, or against steps if no time was logged."""
    train = [m for m in lines if "loss" in m]
    if not train:
        return []
    clock = _clock(lines)
    timed = clock[-1][1] > 0
    at = {step: seconds / 60 if timed else step for step, seconds in clock}
    held_out = [
        (float(np.interp(m["step"], list(at), list(at.values()))), m["eval_loss"])
        for m in lines
        if "eval_loss" in m
    ]
    path = folder / "loss.png"
    xlabel = "minutes of training" if timed else "step"
    xs, losses = [at[m["step"]] for m in train], [m["loss"] for m in train]
    pictures.loss_curve(xs, losses, path, held_out, label, xlabel)
    note = "Time spent on steps, without compiling, sampling, evaluation and checkpoints."
    parts = [html.element("h2", "Loss"), html.image(path)]
    return [*parts, html.element("p", note)] if timed else parts


def _clock(lines: list[dict]) -> list[tuple[int, float]]:
    """Returns (step, seconds spent on steps so far) of every line with a loss."""
    clock, before, seconds = [], 0, 0.0
    for line in (m for m in lines if "loss" in m):
        seconds += line.get("step_time", 0.0) * (line["step"] - before)
        before = line["step"]
        clock.append((before, seconds))
    return clock


_CONTINUE = (
    "To train longer, run the training command again with a larger --config.num_steps; it "
    "continues from the last checkpoint. The other commands:"
)


def commands(workdir: Path) -> list[str]:
    """Returns commands that use the run."""
    flag = shlex.quote(f"--workdir={workdir}")
    return [
        f"python -m imagen_jax.demo {flag}",
        f'python -m imagen_jax.sample {flag} --prompts="a red circle;a blue star"',
        f"python -m imagen_jax.evaluate {flag} --guidance=1,2,4 --num=256",
    ]


def _name(column: str) -> str:
    return "true image" if column == TRUE else column


def _columns(measured: Measured, cell=None) -> tuple[list[str], list[list[str]]]:
    """Returns a metric's header and rows: a row per group, and the columns of `shown`.

    Args:
      cell: (metric, row) -> a cell; the row's text by default. If given, all cells are HTML.
    """
    metric, tables = measured
    columns = shown(list(tables))
    groups = tables[columns[0]]
    text = escape if cell else str
    cell = cell or (lambda metric, row: metric.cell(row))
    rows = [
        [
            text(group),
            str(row.get("num", "")),
            *(cell(metric, tables[c][group]) if group in tables[c] else "" for c in columns),
        ]
        for group, row in groups.items()
    ]
    return ["category", "prompts", *columns], rows


def text_table(measured: Measured) -> str:
    """Returns a metric's table as aligned text for a terminal."""
    header, rows = _columns(measured)
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [header, *rows]
    )
