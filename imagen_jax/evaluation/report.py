"""The HTML page of a run: samples, alignment, loss curve, config. One file, nothing to fetch."""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path

from imagen_jax.common import pictures
from imagen_jax.common.files import write_text

Alignment = dict[str, dict[str, dict[str, float]]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem }
img { max-width: 100% } table { border-collapse: collapse } td, th { padding: .25rem .8rem }
th, td { border-bottom: 1px solid #ddd; text-align: right } td:first-child { text-align: left }
pre { background: #f6f6f6; padding: 1rem; overflow: auto }
"""


def write(workdir: Path, sheets: dict[str, Path], alignment: Alignment) -> Path:
    """Writes workdir/report.html.

    Args:
      sheets: sample grids by title.
      alignment: for each guidance weight, what `evaluate.alignment` returns.
    """
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    train = [(m["step"], m["loss"]) for m in lines if "loss" in m]
    held_out = [(m["step"], m["eval_loss"]) for m in lines if "eval_loss" in m]
    curve = workdir / "evaluation" / "loss.png"
    pictures.loss_curve([s for s, _ in train], [v for _, v in train], curve, held_out)
    speed = [m["images_per_s"] for m in lines if "images_per_s" in m]
    parts = [
        f"<h1>{html.escape(workdir.name)}</h1>",
        f"<p>Step {train[-1][0]:,}, loss {train[-1][1]:.4f}, {speed[-1]:.1f} images/s.</p>",
        "<h2>Do the pictures do what the captions say?</h2>",
        _alignment_table(alignment),
        "<p>Share of pictures that satisfy every claim of their caption, with 95% intervals; in "
        "brackets the share of single claims. The last column is the checker on true renders.</p>",
        *(f"<h2>{html.escape(t)}</h2>{_embedded(p)}" for t, p in sheets.items()),
        f"<h2>Loss</h2>{_embedded(curve)}",
        f"<h2>Config</h2><pre>{html.escape((workdir / 'config.json').read_text())}</pre>",
    ]
    title = html.escape(workdir.name)
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )
    path = workdir / "report.html"
    write_text(path, page)
    return path


def _embedded(path: Path) -> str:
    encoded = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{path.stem}" src="data:image/png;base64,{encoded}">'


def _cell(row: dict[str, float]) -> str:
    fully, half, claims = (100 * row[k] for k in ("fully", "half_width", "claims"))
    return f"{fully:.0f} ± {half:.0f}% ({claims:.0f}%)"


def _columns(alignment: Alignment) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a row a category, a column a guidance weight."""
    categories = list(next(iter(alignment.values())))
    rows = [[c, str(next(iter(alignment.values()))[c]["num"])] for c in categories]
    for row in rows:
        row.extend(_cell(table[row[0]]) for table in alignment.values())
    names = [n if n.startswith("true") else f"guidance {float(n):g}" for n in alignment]
    return ["category", "prompts", *names], rows


def _alignment_table(alignment: Alignment) -> str:
    header, rows = _columns(alignment)
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def text_table(alignment: Alignment) -> str:
    """The same table for a terminal."""
    header, rows = _columns(alignment)
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in [header, *rows]
    )
