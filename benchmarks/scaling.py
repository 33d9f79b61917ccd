"""Predicts weak and strong scaling with the compiler: one plan per slice and batch.

    python -m benchmarks.scaling --config=configs/base64.py --out=scaling

Needs the extra `plan` but no TPU. Plans every slice twice (docs/scaling-log.md): with a batch that
grows with the number of chips (weak), and with a fixed batch (strong). Each plan runs in its own
process, because compiling the base model takes up to 13 GiB. Repeated plans come from the cache of
imagen_jax.plan. Writes scaling.md, scaling.json and scaling.png.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from absl import flags

from imagen_jax.common import cli, pictures
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import make_folder, write_text
from imagen_jax.devices import topologies
from imagen_jax.devices.topologies import GIB
from imagen_jax.planning.report import DOES_NOT_FIT

FLAGS = flags.FLAGS


def define_flags() -> None:
    cli.define_config_flags("configs/base64.py", "Config file to plan.")
    names = "v4-8,v4-32,v4-64,v4-128,v4-256,v4-512,v4-1024,v4-2048,v4-4096"
    flags.DEFINE_list("topologies", names.split(","), "Slices to plan, from small to large.")
    flags.DEFINE_integer("batch_per_chip", 8, "Examples per chip in weak scaling.", 1)
    flags.DEFINE_integer("batch_size", 2048, "Examples per step in strong scaling.", 1)
    flags.DEFINE_bool("fast", True, "Compile with the least effort; see imagen_jax.plan.")
    flags.DEFINE_string("out", "scaling", "Directory of the plans, tables and chart.")


def main(argv: list[str]) -> None:
    """Plans every slice and prints two tables in Markdown."""
    del argv
    slices = [topologies.lookup(name) for name in FLAGS.topologies]
    out = Path(FLAGS.out)
    make_folder(out, "out")
    batches = {
        "weak": [FLAGS.batch_per_chip * t.num_chips for t in slices],
        "strong": [FLAGS.batch_size] * len(slices),
    }
    plans = {
        kind: [plan(t.name, size, out) for t, size in zip(slices, sizes, strict=True)]
        for kind, sizes in batches.items()
    }
    titles = {
        "weak": f"Weak scaling, {FLAGS.batch_per_chip} examples per chip",
        "strong": f"Strong scaling, {FLAGS.batch_size:,} examples per step",
    }
    text = "\n".join(f"{titles[kind]}:\n\n{table(rows)}" for kind, rows in plans.items())
    print(text)
    write_text(out / "scaling.md", text)
    write_text(out / "scaling.json", json.dumps(plans, indent=1) + "\n")
    plot(plans, titles, out / "scaling.png")


def plan(topology: str, batch_size: int, out: Path) -> dict[str, Any]:
    """Runs imagen_jax.plan for one slice and batch, and returns its plan.json.

    Raises:
      UserError: the command failed.
    """
    folder = out / f"{topology}-batch{batch_size}"
    command = [sys.executable, "-m", "imagen_jax.plan", f"--config={FLAGS.config}"]
    command += [f"--topology={topology}", f"--set=batch_size={batch_size}", f"--out={folder}"]
    command += [f"--set={item}" for item in FLAGS.set] + ["--fast"] * FLAGS.fast
    cli.log.info("%s, batch %s", topology, f"{batch_size:,}")
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode not in (0, DOES_NOT_FIT):
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(f"--topologies has {topology}, batch {batch_size}: {lines[-1]}")
    return json.loads((folder / "plan.json").read_text())


def table(plans: list[dict[str, Any]]) -> str:
    """Returns a row per slice; the last column is images/s per chip relative to the first slice."""
    lines = [
        "| slice | chips | batch | data x fsdp x tensor | microbatches | GiB per chip | s per step "
        "| binds | MFU | images/s | efficiency |",
        "|---" * 11 + "|",
    ]
    for p in plans:
        setting, mesh, memory = p["setting"], p["mesh"], p["memory"]
        cells = [p["topology"]["name"], p["topology"]["chips"], f"{setting['batch_size']:,}"]
        sides = (mesh[axis] for axis in ("data", "fsdp", "tensor"))
        cells += [" x ".join(map(str, sides)), setting["microbatches"]]
        cells.append(f"{memory['needed'] / GIB:.1f}")
        if memory["fits"]:
            pace, step = p["pace"], p["step"]
            efficiency = per_chip(p) / per_chip(plans[0]) if plans[0]["memory"]["fits"] else None
            cells += [f"{pace['step_s']:.3f}", step["binds"], f"{pace['mfu']:.1%}"]
            cells += [f"{pace['images_per_s']:,.0f}", f"{efficiency:.0%}" if efficiency else ""]
        else:
            cells += ["does not fit", "", "", "", ""]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def per_chip(plan: dict[str, Any]) -> float:
    """Returns the predicted images/s of one chip."""
    return plan["pace"]["images_per_s"] / plan["topology"]["chips"]


def plot(plans: dict[str, list[dict[str, Any]]], titles: dict[str, str], path: Path) -> None:
    """Plots images/s over chips, with a line for perfect scaling."""
    with pictures.chart(path, xlabel="chips", ylabel="images/s, predicted") as axes:
        axes.set_xscale("log", base=2)
        for kind, rows in plans.items():
            fits = [p for p in rows if p["memory"]["fits"]]
            chips = [p["topology"]["chips"] for p in fits]
            axes.plot(chips, [p["pace"]["images_per_s"] for p in fits], "o-", label=titles[kind])
            if kind == "weak" and fits:
                linear = [n * per_chip(fits[0]) for n in chips]
                axes.plot(chips, linear, "--", color="gray", label="linear")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
