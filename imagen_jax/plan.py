"""Plans a run before anything is rented: does it fit, how fast is it, how long does it take?

    python -m imagen_jax.plan --config=configs/base64.py --topology=v4-512 --out=plans/base64

On any machine: the very step that training runs is compiled by XLA's TPU compiler, libtpu (pip
install -e ".[plan]"), for chips that are not here. --topology takes the names of Cloud TPUs (v4-512
is 256 chips), and gpu or cpu, for which there is the analytic part only. Writes plan.json and
plan.html to --out. Compiling takes minutes, with --fast less; what was compiled once is remembered.

Exit codes: 0 it fits; 1 it does not fit, and the report says what would; 2 bad input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from imagen_jax.common import cli, typed_config
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import make_folder, write_text
from imagen_jax.config import Config, parse
from imagen_jax.devices import sharding, topologies
from imagen_jax.devices.memory import physical_memory
from imagen_jax.devices.topologies import Topology
from imagen_jax.planning import compiling, report, search
from imagen_jax.planning.figures import Run, figures
from imagen_jax.training import experiment

FLAGS = flags.FLAGS

DOES_NOT_FIT = 1
# The part of a chip's memory above which the state is worth splitting over more chips.
WORTH_SPLITTING = 0.05
# Seconds for which the input pipeline is timed.
INPUT_SECONDS = 5.0


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    cli.define_config_flags(None, "Config file, for example configs/base64.py.")
    flags.DEFINE_string(
        "topology",
        "",
        "v4-512, v5litepod-256, v5p-128, v6e-256, gpu, cpu, ...; as the config says.",
    )
    flags.DEFINE_string("out", None, "Folder for plan.json and plan.html; made if it is not there.")
    flags.DEFINE_bool(
        "fast", False, "Compile with the least effort: minutes, but time is an optimistic bound."
    )
    flags.DEFINE_bool(
        "search",
        False,
        "Also try sizes of fsdp and tensor, remat policies, microbatches; rank them.",
    )
    flags.DEFINE_string("cache", "~/.cache/imagen_jax/plan", "Folder of what was compiled before.")


def main(argv: Sequence[str]) -> None:
    """Parses flags, plans, and writes the report."""
    del argv
    # Before JAX looks for devices: what is planned for is never the machine's own.
    jax.config.update("jax_platforms", "cpu")
    if not FLAGS.config or not FLAGS.out:
        raise UserError("--config=FILE and --out=DIR are both needed (see --help)")
    overrides = [f"mesh.topology={FLAGS.topology}"] if FLAGS.topology else []
    config = parse(typed_config.load(FLAGS.config, [*FLAGS.set, *overrides]))
    if not config.mesh.topology:
        raise UserError("--topology is missing; for example --topology=v4-512")
    topology = topologies.lookup(config.mesh.topology, config.mesh.slice)
    if FLAGS.search and not topology.chip.libtpu:
        raise UserError(f"--search compiles, and for {topology.name} nothing here does")
    out, cache = (Path(name).expanduser() for name in (FLAGS.out, FLAGS.cache))
    for folder, flag in ((out, "out"), (cache, "cache")):
        make_folder(folder, flag)
    planner = Planner(config, topology, FLAGS.fast, cache)
    plan = planner.plan(config) | {"config": FLAGS.config, "command": _command()}
    if FLAGS.search:
        plan["search"] = planner.search()
    if planner.compiles and not plan["memory"]["fits"]:
        plan["suggestion"] = planner.suggest(plan["memory"])
    plan["measured_input"] = measured_input(config)
    write(plan, out)
    print(report.text(plan))
    log.info("\nreport: %s", out / "plan.html")
    if not plan["memory"]["fits"]:
        sys.exit(DOES_NOT_FIT)


def write(plan: dict[str, Any], out: Path) -> None:
    """Writes plan.json and plan.html."""
    for name, content in (
        ("plan.json", json.dumps(plan, indent=2) + "\n"),
        ("plan.html", report.page(plan)),
    ):
        write_text(out / name, content)


def _command() -> str:
    return shlex.join(["python", "-m", "imagen_jax.plan", *sys.argv[1:]])


class Planner:
    """Plans settings of one config on one topology."""

    def __init__(self, config: Config, topology: Topology, fast: bool, cache: Path):
        self.config, self.topology, self.fast, self.cache = config, topology, fast, cache
        self.compiles = bool(topology.chip.libtpu)
        self.devices = topologies.devices(topology)
        self._built = experiment.build(config, self.devices)
        self._start = time.perf_counter()
        self._model_flops = 0.0
        self._plans: dict[search.Setting, dict[str, Any]] = {}

    def plan(self, config: Config) -> dict[str, Any]:
        """Every figure of one config, its program compiled if there is a compiler for it.

        Raises:
          UserError: if mesh or batch do not fit the number of chips.
        """
        own = config is self.config
        built = self._built if own else experiment.build(config, self.devices)
        setting, run = setting_of(built), self._run(built)
        compiled = None
        if self.compiles:
            options = {**built.compiler_options, **compiling.effort(self.fast)}
            with self._progress(f"compiling {_words(setting)}"):
                compiled = compiling.compile_step(
                    lower(built), self.topology.label, options, self.cache
                )
            log.info(
                "%s, %.0f s", "from the cache" if compiled.cached else "done", compiled.seconds
            )
        memory = self.topology.chip.hbm_bytes or physical_memory()
        plan = figures(run, self.topology, compiled, self.fast, memory)
        plan |= {
            "topology": self._describe(),
            "mesh": dict(built.mesh.shape),
            "setting": {**dataclasses.asdict(setting), "batch_size": config.batch_size},
            "compiler": compiled and self._compiler(compiled),
        }
        self._plans[setting] = plan
        return plan

    def search(self) -> list[dict[str, Any]]:
        """Rows of the settings tried: the setting, needed, step_s, mfu (None if unknown), note."""
        start, chips = setting_of(self._built), self.topology.slice_chips
        return search.search(start, sharding.REMAT, chips, self._attempt)

    def suggest(self, memory: dict[str, Any]) -> str:
        """The nearest setting to the config's that fits, as flags; "" if none does.

        Args:
          memory: the section of the plan that does not fit.
        """
        state = sum(memory["state"].values()) - memory["state"]["batch"]
        split = state > WORTH_SPLITTING * memory["available"]
        for setting in search.nearest(setting_of(self._built), self._most_fsdp(), split):
            if self._attempt(setting)["step_s"] is not None:
                return str(setting)
        return ""

    def _most_fsdp(self) -> int:
        """Of a slice the devices that share the batch, as far as splitting weights helps."""
        return min(
            self.topology.slice_chips // self._built.mesh.shape["tensor"], sharding.MOST_FSDP
        )

    def _attempt(self, setting: search.Setting) -> search.Row:
        row = {**dataclasses.asdict(setting), "needed": None, "step_s": None, "mfu": None}
        sizes = {"data": -1, "fsdp": setting.fsdp, "tensor": setting.tensor}
        mesh = dataclasses.replace(self.config.mesh, remat=setting.remat, **sizes)
        config = dataclasses.replace(self.config, mesh=mesh, microbatches=setting.microbatches)
        try:
            plan = self._plans.get(setting) or self.plan(config)
        except UserError as e:
            return {**row, "note": str(e)}
        except jax.errors.JaxRuntimeError as e:
            return {**row, "note": f"the compiler failed: {str(e).splitlines()[0]}"}
        row["needed"] = plan["memory"]["needed"]
        if not plan["memory"]["fits"]:
            return {**row, "note": "does not fit"}
        return {**row, "step_s": plan["pace"]["step_s"], "mfu": plan["pace"]["mfu"], "note": ""}

    def _run(self, built: experiment.Experiment) -> Run:
        config, state = built.config, built.abstract_state
        # Neither remat nor the mesh change it, and counting takes a while.
        self._model_flops = self._model_flops or built.stage.model_flops
        per_device = {
            "weights": sharding.bytes_per_device(state.params),
            "ema": sharding.bytes_per_device(state.ema),
            "optimizer": sharding.bytes_per_device(state.opt_state),
            "gradients": sharding.bytes_per_device(state.params),
            "batch": sharding.bytes_per_device(built.stage.abstract_batch),
        }
        example = {
            k: math.prod(x.shape[1:]) * x.dtype.itemsize
            for k, x in built.stage.abstract_batch.items()
        }
        return Run(
            num_params=built.stage.num_params,
            state=per_device,
            checkpoint_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
            model_flops=self._model_flops,
            batch_size=config.batch_size,
            num_steps=config.num_steps,
            image_bytes=example["image"],
            text_bytes=example["text"] + example["text_mask"],
            token_bytes=example["text"] // config.text.tokens,
        )

    def _describe(self) -> dict[str, Any]:
        t = self.topology
        return {
            "name": t.label,
            "slices": t.slices,
            "shape": t.shape,
            "chips": t.num_chips,
            "hosts": t.num_hosts,
            "ici_bytes_per_s": t.ici_bytes_per_s,
            "chip": dataclasses.asdict(t.chip),
        }

    def _compiler(self, compiled: compiling.Compiled) -> dict[str, Any]:
        return {
            "libtpu": compiling.compiler_version(),
            "jax": jax.__version__,
            "fast": self.fast,
            "seconds": compiled.seconds,
            "cached": compiled.cached,
        }

    @contextlib.contextmanager
    def _progress(self, what: str) -> Iterator[None]:
        """Says what is going on now and every half minute, with the time since the start."""
        over = threading.Event()

        def say() -> None:
            while True:
                log.info("[%4.0f s] %s", time.perf_counter() - self._start, what)
                if over.wait(30):
                    return

        thread = threading.Thread(target=say, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def setting_of(built: experiment.Experiment) -> search.Setting:
    """The part of an experiment's config that a search changes, as numbers."""
    sizes = (built.mesh.shape[axis] for axis in ("fsdp", "tensor"))
    return search.Setting(built.remat, *sizes, built.microbatches)


def lower(built: experiment.Experiment) -> jax.stages.Lowered:
    """The program of a training step, for the devices that it was built on."""
    return built.step.lower(built.abstract_state, built.stage.abstract_batch)


def _words(setting: search.Setting) -> str:
    return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(setting).items())


def measured_input(config: Config) -> str:
    """How fast this host delivers training batches of the config's data, if they are here."""
    if not Path(config.data.dir).is_dir():
        return f"not measured: there is no config.data.dir={config.data.dir} here"
    with cli.quiet_imports():
        from data_pipelines.reading.batches import Reader
    size = min(config.batch_size, 64)
    try:
        batches = Reader(dataclasses.replace(config, batch_size=size)).train_batches(0)
        batch = next(batches)
        start, count = time.perf_counter(), 0
        while time.perf_counter() - start < INPUT_SECONDS:
            batch = next(batches)
            count += size
    except UserError as e:
        return f"not measured: {e}"
    rate = count / (time.perf_counter() - start)
    padded = rate * sum(x.nbytes for x in batch.values()) / size
    cores = len(os.sched_getaffinity(0))
    return f"{rate:,.1f} images/s, {padded / 1e6:,.1f} MB/s padded, on {cores} core(s)"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
