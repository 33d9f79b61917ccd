"""Writes a plan as text and as one self-contained HTML page, from the same rows."""

from __future__ import annotations

from typing import Any

from imagen_jax.common import html
from imagen_jax.planning import search

GIB = 2**30
# Exit code of imagen_jax.plan for a run that does not fit.
DOES_NOT_FIT = 1
Rows = list[tuple[str, str]]

COLORS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#9c755f")


def verdict(plan: dict[str, Any]) -> str:
    """Says in a sentence or two whether the run fits."""
    memory = plan["memory"]
    needed, available = memory["needed"] / GIB, memory["available"] / GIB
    where = f"{plan['setting']['batch_size']} examples per step on {plan['topology']['name']}"
    if not memory["fits"]:
        advice = "No setting tried fits: use more chips, a smaller batch or a smaller model"
        if suggestion := plan.get("suggestion"):
            advice = f"This fits: {suggestion}"
        return (
            f"It does not fit: {where} need {needed:.2f} GiB per chip, "
            f"{needed - available:.2f} GiB more than the {available:.2f} GiB available. {advice}."
        )
    if not memory["program"]:
        return (
            f"State, gradients and batch of {where} need {needed:.2f} of {available:.2f} GiB; "
            "activations come on top (only programs for TPUs can be compiled here)."
        )
    return f"It fits: {where} need {needed:.2f} of {available:.2f} GiB per chip."


def sections(plan: dict[str, Any]) -> list[tuple[str, Rows]]:
    """Returns (heading, rows of label and value)."""
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
        cached = ", from the cache" if compiler["cached"] else ""
        effort = "low (--fast)" if compiler["fast"] else "full"
        rows.append(("compiler", f"libtpu {compiler['libtpu']}, jax {compiler['jax']}"))
        rows.append(("compiled", f"in {compiler['seconds']:.0f} s, effort {effort}{cached}"))
    return rows


def _memory(memory: dict[str, Any]) -> Rows:
    program = memory["program"]
    state = [(k, f"{v / GIB:.3f}") for k, v in memory["state"].items()]
    rows = [(f"program: {k}", f"{v / GIB:.3f}") for k, v in program.items()]
    total = [(k, f"{memory[k] / GIB:.2f}") for k in ("needed", "available")]
    return [*state, *rows, *total]


def _flops(flops: dict[str, float]) -> Rows:
    rows = [
        ("model, TFLOP per step", f"{flops['model_per_step'] / 1e12:,.2f}"),
        ("model, GFLOP per image", f"{flops['model_per_image'] / 1e9:,.2f}"),
    ]
    if "ratio" in flops:
        rows += [
            ("compiled, TFLOP per step", f"{flops['compiled_per_step'] / 1e12:,.2f}"),
            ("compiled, GFLOP per image", f"{flops['compiled_per_image'] / 1e9:,.2f}"),
            ("compiled, TFLOP per step and chip", f"{flops['compiled_per_chip'] / 1e12:,.3f}"),
            ("compiled / model", f"{flops['ratio']:.3f}"),
        ]
    return rows


def _step(step: dict[str, Any]) -> Rows:
    rows = [
        (f"lower bound, {kind}", f"{seconds:.4f}{' (binds)' if kind == step['binds'] else ''}")
        for kind, seconds in step["bounds"].items()
    ]
    own = f"{step['compiler_s']:.4f} ({step['source']})" if step["compiler_s"] else "none"
    rows.append(("compiler's estimate", own))
    rows.append(("waiting for other chips", f"{step['exposed_s']:.4f}"))
    rows.append(("predicted", f"{step['step_s']:.4f}"))
    rows.append(("memory traffic per chip, GB", f"{step['bytes'] / 1e9:,.2f}"))
    for kind, row in step["collectives"].items():
        rows.append((f"{kind} ({row['count']:,}), GB received", f"{row['bytes'] / 1e9:,.3f}"))
    if step["host_bytes"]:
        rows.append(("to host memory and back, GB", f"{step['host_bytes'] / 1e9:,.3f}"))
    if step["unknown_loops"]:
        rows.append(("loops counted as one iteration", str(step["unknown_loops"])))
    return rows


def _pace(plan: dict[str, Any], compiled: bool) -> Rows:
    pace = plan["pace"]
    rows = [("images/s", f"{pace['images_per_s']:,.0f}")]
    if compiled:
        rows.append(("MFU (the model's FLOPs)", f"{pace['mfu']:.1%}"))
        rows.append(("HFU (with recomputation)", f"{pace['hfu']:.1%}"))
    rows.append((f"days for {pace['num_steps']:,} steps", f"{pace['days']:,.1f}"))
    rows.append(("chip-hours", f"{pace['chip_hours']:,.0f}"))
    if "dollars" in pace:
        price = f"${pace['price_per_chip_hour']:g} per chip-hour"
        rows.append((f"cost at {price}", f"${pace['dollars']:,.2f}"))
        rows.append(("cost per 1,000 steps", f"${pace['dollars_per_1000_steps']:,.2f}"))
    return rows


def _input(plan: dict[str, Any]) -> Rows:
    need = plan["input"]
    return [
        ("needed, images/s per host", f"{need['images_per_s_per_host']:,.1f}"),
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
    """Returns header and rows of the search: the fastest first, settings that do not fit last."""
    mesh, cost = ["remat", "fsdp", "tensor", "microbatches"], ["GiB per chip", "s per step", "MFU"]
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
    return [[*mesh, *cost, "note"], *rows]


def text(plan: dict[str, Any]) -> str:
    """Returns the plan as text for a terminal."""
    lines = [verdict(plan)]
    for title, rows in sections(plan):
        lines += ["", title, *(f"  {label:<42}{value}" for label, value in rows)]
    if plan.get("search"):
        table = search_rows(plan)
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines += ["", "Search, fastest first"]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def page(plan: dict[str, Any]) -> str:
    """Returns the plan as an HTML page."""
    parts = [
        html.element("p", verdict(plan), "good" if plan["memory"]["fits"] else "bad"),
        _bar(plan["memory"]),
        *(html.element("h2", title) + html.table((), rows) for title, rows in sections(plan)),
    ]
    if plan.get("search"):
        header, *rows = search_rows(plan)
        parts.append(html.element("h2", "Search, fastest first") + html.table(header, rows))
    parts.append(html.element("h2", "Command") + html.element("pre", plan["command"]))
    return html.page(f"{plan['config']} on {plan['topology']['name']}", *parts)


def _bar(memory: dict[str, Any]) -> str:
    """Returns a bar of one chip's memory: the state by kind, then activations and the rest."""
    kinds = {k: v for k, v in memory["state"].items() if k != "gradients" or not memory["program"]}
    kinds["activations and the rest"] = max(memory["needed"] - sum(kinds.values()), 0)
    full = max(memory["needed"], memory["available"]) or 1
    parts = (
        f'<div style="width:{100 * v / full:.2f}%;background:{color};overflow:hidden" '
        f'title="{k}: {v / GIB:.2f} GiB">&nbsp;{k}</div>'
        for (k, v), color in zip(kinds.items(), COLORS, strict=False)
    )
    return f'<div style="display:flex;height:1.6rem;background:#eee">{"".join(parts)}</div>'
