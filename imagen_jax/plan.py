"""Plans a run before you rent hardware: whether it fits, how fast it is, how long it takes.

    python -m imagen_jax.plan --config=configs/base64.py --topology=v4-512

Runs on any machine. XLA's TPU compiler, libtpu (pip install -e ".[plan]"), compiles the same step
that training runs, for chips that this machine does not have. --topology takes Cloud TPU names
(v4-512 has 256 chips); for gpu and cpu the plan is analytic only. Writes plan.json and plan.html
to --out. Compiling takes minutes, less with --fast; a cache keeps compiled results.

Exit codes: 0 the run fits; 1 it does not fit, and the report suggests settings that do; 2 bad
input.
"""

from __future__ import annotations

import contextlib
import json
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from imagen_jax.common import cli, typed_config
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import make_folder, write_text

# JAX and the modules that use it are imported in `main`, so that --help answers at once.
if TYPE_CHECKING:
    from imagen_jax.config import Config

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    cli.define_config_flags(None, "Config file, for example configs/base64.py:v4-512.")
    flags.DEFINE_string(
        "topology",
        "",
        "Hardware to plan for: v4-512, v5litepod-256, v5p-128, v6e-256, gpu, cpu, ... (default: "
        "the config's mesh.topology).",
    )
    flags.DEFINE_string(
        "out",
        None,
        "Directory of plan.json and plan.html; created if missing (default: plans/CONFIG, for "
        "example plans/base64_v4-512).",
    )
    flags.DEFINE_bool(
        "fast",
        False,
        "Compile with the least effort: a few minutes, but the predicted time is optimistic.",
    )
    flags.DEFINE_bool(
        "search",
        False,
        "Also try sizes of fsdp and tensor, remat policies and microbatches, and rank them.",
    )
    flags.DEFINE_float(
        "price_per_chip_hour",
        None,
        "Price of one chip for one hour, in dollars; the plan then includes the cost of the run.",
    )
    flags.DEFINE_string("cache", "~/.cache/imagen_jax/plan", "Directory of compiled results.")


def main(argv: Sequence[str]) -> None:
    """Reads the flags, plans the run and writes the report."""
    del argv
    price = FLAGS.price_per_chip_hour
    if price is not None and not 0 <= price < math.inf:
        raise UserError(f"--price_per_chip_hour is {price}; allowed: dollars, 0 or more")
    if not FLAGS.config:
        raise UserError("--config=FILE is needed (see --help)")
    import jax

    # Set before JAX looks for devices: a plan never uses this machine's accelerator.
    jax.config.update("jax_platforms", "cpu")
    from imagen_jax.config import parse
    from imagen_jax.devices import topologies
    from imagen_jax.planning import figures, report
    from imagen_jax.planning.planner import Planner

    overrides = [f"mesh.topology={FLAGS.topology}"] if FLAGS.topology else []
    config = parse(typed_config.load(FLAGS.config, [*FLAGS.set, *overrides]))
    if not config.mesh.topology:
        raise UserError("--topology is missing; for example --topology=v4-512")
    topology = topologies.lookup(config.mesh.topology, config.mesh.slice)
    if FLAGS.search and not topology.chip.libtpu:
        raise UserError(
            f"--search needs a TPU topology, but this one is {topology.name}; leave --search out"
        )
    out = Path(FLAGS.out or default_folder(FLAGS.config, topology.name)).expanduser()
    cache = Path(FLAGS.cache).expanduser()
    for folder, flag in ((out, "out"), (cache, "cache")):
        make_folder(folder, flag)
    planner = Planner(config, topology, FLAGS.fast, cache)
    plan = planner.plan(config) | {"config": FLAGS.config, "command": _command()}
    if FLAGS.search:
        plan["search"] = planner.search()
    if planner.compiles and not plan["memory"]["fits"]:
        plan["suggestion"] = planner.suggest(plan["memory"])
    if price is not None and "pace" in plan:
        plan["pace"] |= figures.dollars(plan["pace"], price)
    plan["measured_input"] = measured_input(config)
    write(plan, out)
    print(report.text(plan))
    log.info("\nreport: %s", out / "plan.html")
    if not plan["memory"]["fits"]:
        sys.exit(report.DOES_NOT_FIT)


def default_folder(spec: str, topology: str) -> str:
    """Returns the folder of a plan, with the topology in its name: "plans/base64_v4-512".

    Args:
      spec: value of --config.
      topology: name of the topology; `spec` may contain it already.
    """
    name = typed_config.run_name(spec)
    return f"plans/{name}" if topology in name.split("_") else f"plans/{name}_{topology}"


def write(plan: dict[str, Any], out: Path) -> None:
    """Writes plan.json and plan.html."""
    from imagen_jax.planning import report

    write_text(out / "plan.json", json.dumps(plan, indent=2) + "\n")
    write_text(out / "plan.html", report.page(plan))


def _command() -> str:
    return shlex.join(["python", "-m", "imagen_jax.plan", *sys.argv[1:]])


def measured_input(config: Config) -> str:
    """Describes how fast this host delivers training batches, if the config's data is here."""
    import dataclasses

    from etils import epath

    from imagen_jax.planning.host_input import describe_rate

    if not epath.Path(config.data.dir).is_dir():
        return f"not measured: config.data.dir is {config.data.dir!r}, which does not exist here"
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader
    few = dataclasses.replace(config, batch_size=min(config.batch_size, 64))
    try:
        with contextlib.closing(Reader(few).train_batches(0)) as batches:
            return describe_rate(batches)
    except UserError as e:
        return f"not measured: {e}"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
