"""Plans settings of one config on one topology: builds, compiles, and collects the figures."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config
from imagen_jax.devices import sharding, topologies
from imagen_jax.devices.memory import physical_memory
from imagen_jax.devices.topologies import Topology
from imagen_jax.planning import compiling, search
from imagen_jax.planning.figures import Run, figures
from imagen_jax.training.experiment import Experiment, build

# Suggest sharding the state over more chips only if it takes more than this share of the memory.
WORTH_SPLITTING = 0.05


class Planner:
    """Planner of the settings of one config on one topology.

    Attributes:
      compiles: whether libtpu compiles for the topology's chips.
      devices: the devices to compile for.
    """

    def __init__(self, config: Config, topology: Topology, fast: bool, cache: Path):
        """Builds the experiment of `config`.

        Args:
          fast: whether to compile with the least effort.
          cache: folder of compiled results.
        """
        self.config, self.topology, self.fast, self.cache = config, topology, fast, cache
        self.compiles = bool(topology.chip.libtpu)
        self.devices = topologies.devices(topology)
        self._experiment = build(config, self.devices)
        self._start = time.perf_counter()
        self._model_flops = 0.0
        self._plans: dict[search.Setting, dict[str, Any]] = {}

    def plan(self, config: Config) -> dict[str, Any]:
        """Returns all figures of one config; compiles its step if the topology has a compiler.

        Raises:
          UserError: the mesh or the batch does not fit the number of chips.
        """
        own = config is self.config
        experiment = self._experiment if own else build(config, self.devices)
        setting, run = setting_of(experiment), self._run(experiment)
        compiled = None
        if self.compiles:
            options = {**experiment.compiler_options, **compiling.effort(self.fast)}
            with self._progress(f"compiling {_words(setting)}"):
                compiled = compiling.compile_step(
                    lower(experiment), self.topology.label, options, self.cache
                )
            outcome = "found in the cache" if compiled.cached else "compiled"
            log.info("%s; compiling took %.0f s", outcome, compiled.seconds)
        memory = self.topology.chip.hbm_bytes or physical_memory()
        plan = figures(run, self.topology, compiled, self.fast, memory)
        plan |= {
            "topology": self._describe(),
            "mesh": dict(experiment.mesh.shape),
            "setting": {**dataclasses.asdict(setting), "batch_size": config.batch_size},
            "compiler": compiled and self._compiler(compiled),
        }
        self._plans[setting] = plan
        return plan

    def search(self) -> list[dict[str, Any]]:
        """Returns a row per setting tried: the setting, needed, step_s, mfu, note.

        step_s and mfu are None unless the setting fits.
        """
        start, chips = setting_of(self._experiment), self.topology.slice_chips
        return search.search(start, sharding.REMAT, chips, self._attempt)

    def suggest(self, memory: dict[str, Any]) -> str:
        """Returns the setting nearest to the config's that fits, as flags; "" if none fits.

        Args:
          memory: the section "memory" of the plan that does not fit.
        """
        state = sum(memory["state"].values()) - memory["state"]["batch"]
        split = state > WORTH_SPLITTING * memory["available"]
        for setting in search.nearest(setting_of(self._experiment), self._most_fsdp(), split):
            if self._attempt(setting)["step_s"] is not None:
                return str(setting)
        return ""

    def _most_fsdp(self) -> int:
        """Returns the largest useful fsdp: the chips of a slice / tensor, at most MOST_FSDP."""
        return min(
            self.topology.slice_chips // self._experiment.mesh.shape["tensor"], sharding.MOST_FSDP
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

    def _run(self, experiment: Experiment) -> Run:
        config, state = experiment.config, experiment.abstract_state
        # Counting takes a while; neither remat nor the mesh changes the result.
        self._model_flops = self._model_flops or experiment.stage.model_flops
        per_device = {
            "weights": sharding.bytes_per_device(state.params),
            "ema": sharding.bytes_per_device((state.ema, state.averages)),
            "optimizer": sharding.bytes_per_device(state.opt_state),
            "gradients": sharding.bytes_per_device(state.params),
            "batch": sharding.bytes_per_device(experiment.stage.abstract_batch),
        }
        example = {
            k: math.prod(x.shape[1:]) * x.dtype.itemsize
            for k, x in experiment.stage.abstract_batch.items()
        }
        return Run(
            num_params=experiment.stage.num_params,
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
    def _progress(self, action: str) -> Iterator[None]:
        """Logs `action` now and every 30 seconds, with the time since the start."""
        over = threading.Event()

        def report() -> None:
            while True:
                log.info("[%4.0f s] %s", time.perf_counter() - self._start, action)
                if over.wait(30):
                    return

        thread = threading.Thread(target=report, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def setting_of(experiment: Experiment) -> search.Setting:
    """Returns the keys of an experiment's config that a search may change, every value resolved."""
    sizes = (experiment.mesh.shape[axis] for axis in ("fsdp", "tensor"))
    return search.Setting(experiment.remat, *sizes, experiment.microbatches)


def lower(experiment: Experiment) -> jax.stages.Lowered:
    """Lowers the training step for the experiment's devices."""
    return experiment.step.lower(experiment.abstract_state, experiment.stage.abstract_batch)


def _words(setting: search.Setting) -> str:
    return ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(setting).items())
