"""The HTML report of a run: samples, alignment, loss curve, config. One self-contained file."""

from __future__ import annotations

import json
from pathlib import Path

from imagen_jax.common import html, pictures
from imagen_jax.common.files import write_text
from imagen_jax.runs import workdir as runs

Alignment = dict[str, dict[str, dict[str, float]]]


def write(workdir: Path, sheets: dict[str, Path], alignment: Alignment) -> Path:
    """Writes workdir/report.html and returns its path.

    Args:
      sheets: sample grids by title.
      alignment: what `evaluate.alignment` returns for each guidance weight.
    """
    lines = [json.loads(line) for line in (workdir / runs.METRICS).read_text().splitlines()]
    train = [(m["step"], m["loss"]) for m in lines if "loss" in m]
    held_out = [(m["step"], m["eval_loss"]) for m in lines if "eval_loss" in m]
    curve = workdir / runs.EVALUATION / "loss.png"
    label = runs.read_config(workdir).loss_label
    pictures.loss_curve([s for s, _ in train], [v for _, v in train], curve, held_out, label)
    speed = [m["images_per_s"] for m in lines if "images_per_s" in m]
    summary = f"Step {train[-1][0]:,}, loss {train[-1][1]:.4f}, {speed[-1]:.1f} images/s."
    note = (
        "Share of images that satisfy every claim of their caption, with 95% Wilson intervals, and "
        "the share of single claims. The last column is the checker on true renders."
    )
    parts = [
        html.element("p", summary),
        html.element("h2", "Do the images match their captions?"),
        html.table(*_columns(alignment)),
        html.element("p", note),
        *(html.element("h2", title) + html.image(path) for title, path in sheets.items()),
        html.element("h2", "Loss") + html.image(curve),
        html.element("h2", "Config"),
        html.element("pre", (workdir / runs.CONFIG).read_text()),
    ]
    path = workdir / runs.REPORT
    write_text(path, html.page(workdir.name, *parts))
    return path


def _cell(row: dict[str, float]) -> str:
    fully, low, high, claims = (100 * row[k] for k in ("fully", "low", "high", "claims"))
    return f"{fully:.0f}% ({low:.0f}-{high:.0f}%), claims {claims:.0f}%"


def _columns(alignment: Alignment) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a row per category, a column per guidance weight."""
    categories = list(next(iter(alignment.values())))
    rows = [[c, str(next(iter(alignment.values()))[c]["num"])] for c in categories]
    for row in rows:
        row.extend(_cell(table[row[0]]) for table in alignment.values())
    names = [n if n.startswith("true") else f"guidance {float(n):g}" for n in alignment]
    return ["category", "prompts", *names], rows


def text_table(alignment: Alignment) -> str:
    """Returns the same table as aligned text for a terminal."""
    header, rows = _columns(alignment)
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [header, *rows]
    )
