"""The HTML report of a run: metrics, samples, loss curve, config. One self-contained file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from imagen_jax.common import html, pictures
from imagen_jax.common.files import write_text
from imagen_jax.evaluation.metric import Metric, Table
from imagen_jax.runs import workdir as runs

TRUE = "true images"  # the column of the examples' own images


class Measured(NamedTuple):
    """A metric and its tables by column; a column is a guidance weight, see `title`, or TRUE."""

    metric: Metric
    tables: dict[str, Table]


def write(workdir: Path, sheets: dict[str, Path], results: Sequence[Measured]) -> Path:
    """Writes workdir/report.html and returns its path.

    Args:
      sheets: files of the sample grids, by title.
      results: the metrics, in the order of display.
    """
    lines = runs.read_metrics(workdir)
    train = [(m["step"], m["loss"]) for m in lines if "loss" in m]
    held_out = [(m["step"], m["eval_loss"]) for m in lines if "eval_loss" in m]
    summary, curve = "The run has logged no loss.", workdir / runs.EVALUATION / "loss.png"
    if train:
        label = runs.read_config(workdir).loss_label
        pictures.loss_curve([s for s, _ in train], [v for _, v in train], curve, held_out, label)
        speed = [m["images_per_s"] for m in lines if "images_per_s" in m]
        summary = f"Step {train[-1][0]:,}, loss {train[-1][1]:.4f}, {speed[-1]:.1f} images/s."
    parts = [
        html.element("p", summary),
        *(
            html.element("h2", measured.metric.title)
            + html.table(*_columns(measured))
            + html.element("p", f"{measured.metric.note} The last column has the true images.")
            for measured in results
        ),
        *(html.element("h2", title) + html.image(path) for title, path in sheets.items()),
        *([html.element("h2", "Loss") + html.image(curve)] if train else []),
        html.element("h2", "Config"),
        html.element("pre", (workdir / runs.CONFIG).read_text()),
    ]
    path = workdir / runs.REPORT
    write_text(path, html.page(workdir.name, *parts))
    return path


def _columns(measured: Measured) -> tuple[list[str], list[list[str]]]:
    """Returns a metric's header and rows: a row per group, a column per guidance weight."""
    metric, tables = measured
    groups = next(iter(tables.values()))
    rows = [
        [group, str(row["num"]), *(metric.cell(table[group]) for table in tables.values())]
        for group, row in groups.items()
    ]
    return ["category", "prompts", *map(title, tables)], rows


def title(column: str) -> str:
    """Returns a column's title: "3.0, EMA 0.05" gives "guidance 3, EMA 0.05"; TRUE stays."""
    if column == TRUE:
        return column
    weight, comma, rest = column.partition(",")
    return f"guidance {float(weight):g}{comma}{rest}"


def text_table(measured: Measured) -> str:
    """Returns a metric's table as aligned text for a terminal."""
    header, rows = _columns(measured)
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [header, *rows]
    )
