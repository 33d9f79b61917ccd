"""A plan as text and as one HTML page with nothing to fetch, from the same rows."""

from __future__ import annotations

import html
from typing import Any

from imagen_jax.planning import search

GIB = 2**30
Rows = list[tuple[str, str]]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 900px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin-bottom: 1rem } td, th { padding: .2rem .8rem }
th, td { border-bottom: 1px solid #ddd; text-align: left } td + td { text-align: right }
pre { background: #f6f6f6; padding: 1rem; overflow: auto }
.bar { display: flex; height: 1.6rem; background: #eee; margin: .5rem 0 }
.bar div { overflow: hidden }
.no { background: #fdd; padding: .5rem 1rem } .yes { background: #dfd; padding: .5rem 1rem }
"""
COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#9c755f")


def verdict(plan: dict[str, Any]) -> str:
    """Whether it fits, in a sentence or two."""
    memory = plan["memory"]
    needed, available = memory["needed"] / GIB, memory["available"] / GIB
    where = f"{plan['setting']['batch_size']} examples a step on {plan['topology']['name']}"
    if not memory["fits"]:
        how = "Nothing that was tried fits: take more chips, a smaller batch or a smaller model"
        if suggestion := plan.get("suggestion"):
            how = f"This fits: {suggestion}"
        return (
            f"It does not fit: {where} need {needed:.2f} GiB a chip, {needed - available:.2f} GiB "
            f"more than the {available:.2f} GiB that it has. {how}."
        )
    if not memory["program"]:
        return (
            f"State, gradients and batch of {where} need {needed:.2f} of {available:.2f} GiB; "
            "activations come on top (only TPUs can be compiled for from here)."
        )
    return f"It fits: {where} need {needed:.2f} of {available:.2f} GiB a chip."


def sections(plan: dict[str, Any]) -> list[tuple[str, Rows]]:
    """The figures by heading, as (label, value)."""
    parts = [
        ("Run", _run(plan)),
        ("Memory of one chip, GiB", _memory(plan["memory"])),
        ("FLOPs", _flops(plan["flops"])),
    ]
    if "step" in plan:
        parts.append(("Step, seconds", _step(plan["step"])))
    if "pace" in plan:
        compiled = "step" in plan
        parts.append(
            ("Pace" if compiled else "Pace at peak, an upper bound", _pace(plan, compiled))
        )
        parts.append(("Input", _input(plan)))
    return parts


def _run(plan: dict[str, Any]) -> Rows:
    t, s = plan["topology"], plan["setting"]
    compiler = plan["compiler"]
    shape = t["shape"] if t["slices"] == 1 else f"{t['slices']} slices of {t['shape']}"
    rows = [
        ("config", plan["config"]),
        ("topology", f"{t['name']}: {t['chips']} chips ({shape}), {t['hosts']} host(s)"),
        ("mesh", " x ".join(f"{axis}={size}" for axis, size in plan["mesh"].items())),
        ("remat, microbatches", f"{s['remat']}, {s['microbatches']}"),
        ("batch", f"{s['batch_size']:,}"),
        ("parameters", f"{plan['parameters']:,}"),
        ("checkpoint", f"{plan['checkpoint_bytes'] / 1e9:.2f} GB (weights, EMA, optimizer)"),
    ]
    if compiler:
        found = "from the cache" if compiler["cached"] else "now"
        effort = "low (--fast)" if compiler["fast"] else "full"
        rows.append(("compiler", f"libtpu {compiler['libtpu']}, jax {compiler['jax']}"))
        rows.append(("compiled", f"{found}, in {compiler['seconds']:.0f} s, effort {effort}"))
    return rows


def _memory(memory: dict[str, Any]) -> Rows:
    program = memory["program"]
    state = [(k, f"{v / GIB:.3f}") for k, v in memory["state"].items()]
    rows = [(f"program: {k}", f"{v / GIB:.3f}") for k, v in program.items()]
    total = [(k, f"{memory[k] / GIB:.2f}") for k in ("needed", "available")]
    return [*state, *rows, *total]


def _flops(flops: dict[str, float]) -> Rows:
    rows = [
        ("model, a step, TFLOP", f"{flops['model_per_step'] / 1e12:,.2f}"),
        ("model, an image, GFLOP", f"{flops['model_per_image'] / 1e9:,.2f}"),
    ]
    if "ratio" in flops:
        rows += [
            ("compiled, a step, TFLOP", f"{flops['compiled_per_step'] / 1e12:,.2f}"),
            ("compiled, an image, GFLOP", f"{flops['compiled_per_image'] / 1e9:,.2f}"),
            ("compiled, a step and chip, TFLOP", f"{flops['compiled_per_chip'] / 1e12:,.3f}"),
            ("compiled / model", f"{flops['ratio']:.3f}"),
        ]
    return rows


def _step(step: dict[str, Any]) -> Rows:
    rows = [
        (f"at least, for {kind}", f"{seconds:.4f}{' (binds)' if kind == step['binds'] else ''}")
        for kind, seconds in step["bounds"].items()
    ]
    own = f"{step['compiler_s']:.4f} ({step['source']})" if step["compiler_s"] else "none"
    rows.append(("the compiler's estimate", own))
    rows.append(("waiting for other chips", f"{step['exposed_s']:.4f}"))
    rows.append(("predicted", f"{step['step_s']:.4f}"))
    rows.append(("memory traffic of a chip, GB", f"{step['bytes'] / 1e9:,.2f}"))
    for kind, row in step["collectives"].items():
        rows.append(
            (f"{kind}, {row['count']:,} of them, GB received", f"{row['bytes'] / 1e9:,.3f}")
        )
    if step["host_bytes"]:
        rows.append(("to the host's memory and back, GB", f"{step['host_bytes'] / 1e9:,.3f}"))
    if step["unknown_loops"]:
        rows.append(("loops counted as one turn", str(step["unknown_loops"])))
    return rows


def _pace(plan: dict[str, Any], compiled: bool) -> Rows:
    pace = plan["pace"]
    rows = [("images/s", f"{pace['images_per_s']:,.0f}")]
    if compiled:
        rows.append(("MFU (the model's FLOPs)", f"{pace['mfu']:.1%}"))
        rows.append(("HFU (with recomputation)", f"{pace['hfu']:.1%}"))
    return [
        *rows,
        (f"days for {pace['num_steps']:,} steps", f"{pace['days']:,.1f}"),
        ("chip-hours", f"{pace['chip_hours']:,.0f}"),
    ]


def _input(plan: dict[str, Any]) -> Rows:
    need = plan["input"]
    return [
        ("needed, images/s a host", f"{need['images_per_s_per_host']:,.1f}"),
        (
            "to the chips, padded bf16 text, MB/s",
            f"{need['padded_bytes_per_s_per_host'] / 1e6:,.1f}",
        ),
        (
            f"read, uint8 and {need['tokens_read']} tokens ragged, MB/s",
            f"{need['read_bytes_per_s_per_host'] / 1e6:,.1f}",
        ),
        ("this host delivers", plan.get("measured_input", "not measured")),
    ]


def search_rows(plan: dict[str, Any]) -> list[list[str]]:
    """Header and rows of the search's table: the fastest first, then what does not fit."""

    header = ["remat", "fsdp", "tensor", "microbatches", "GiB a chip", "step s", "MFU", "note"]
    rows = [
        [
            e["remat"],
            str(e["fsdp"]),
            str(e["tensor"]),
            str(e["microbatches"]),
            "" if e["needed"] is None else f"{e['needed'] / GIB:.2f}",
            "" if e["step_s"] is None else f"{e['step_s']:.4f}",
            "" if e["mfu"] is None else f"{e['mfu']:.1%}",
            e["note"],
        ]
        for e in sorted(plan["search"], key=search.seconds)
    ]
    return [header, *rows]


def text(plan: dict[str, Any]) -> str:
    """For a terminal."""
    lines = [verdict(plan)]
    for title, rows in sections(plan):
        lines += ["", title, *(f"  {label:<42}{value}" for label, value in rows)]
    if plan.get("search"):
        table = search_rows(plan)
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines += ["", "Search, the fastest first"]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def page(plan: dict[str, Any]) -> str:
    """The HTML page."""
    title = html.escape(f"{plan['config']} on {plan['topology']['name']}")
    style = "yes" if plan["memory"]["fits"] else "no"
    parts = [
        f"<h1>{title}</h1>",
        f"<p class={style}>{html.escape(verdict(plan))}</p>",
        _bar(plan["memory"]),
        *(f"<h2>{html.escape(t)}</h2>{_table(map(list, rows))}" for t, rows in sections(plan)),
    ]
    if plan.get("search"):
        header, *rows = search_rows(plan)
        parts.append(f"<h2>Search, the fastest first</h2>{_table(rows, header)}")
    parts.append(f"<h2>Command</h2><pre>{html.escape(plan['command'])}</pre>")
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title>"
        f"<style>{STYLE}</style>{''.join(parts)}</html>\n"
    )


def _table(rows: Any, header: list[str] | None = None) -> str:
    head = (
        "<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in header) + "</tr>" if header else ""
    )
    body = ("".join(f"<td>{html.escape(c)}</td>" for c in row) for row in rows)
    return f"<table>{head}{''.join(f'<tr>{cells}</tr>' for cells in body)}</table>"


def _bar(memory: dict[str, Any]) -> str:
    """The memory of a chip as a bar: state by kind, and what the program needs besides."""
    kinds = {k: v for k, v in memory["state"].items() if k != "gradients" or not memory["program"]}
    kinds["activations and the rest"] = max(memory["needed"] - sum(kinds.values()), 0)
    full = max(memory["needed"], memory["available"]) or 1
    parts = (
        f'<div style="width:{100 * v / full:.2f}%;background:{color}" '
        f'title="{k}: {v / GIB:.2f} GiB">&nbsp;{k}</div>'
        for (k, v), color in zip(kinds.items(), COLORS, strict=False)
    )
    return f"<div class=bar>{''.join(parts)}</div>"
