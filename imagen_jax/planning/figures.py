"""Computes all figures of a plan as nested dicts for JSON. Bytes and FLOPs are unscaled."""

from __future__ import annotations

import dataclasses
from typing import Any

from imagen_jax.devices.topologies import Topology
from imagen_jax.planning import costs, hlo, roofline
from imagen_jax.planning.compiling import Compiled

# About the length of a caption from the web; embeddings are stored and read without padding.
TOKENS_READ = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """The properties of a run that do not depend on the compiler.

    Attributes:
      num_params: parameters of the network.
      state: bytes on one device by kind: weights, ema, optimizer, gradients, batch.
      checkpoint_bytes: weights, EMA and optimizer state, unsharded.
      model_flops: FLOPs of one step of the whole batch, forward and backward, without
        recomputation.
      batch_size: examples in one step.
      num_steps: steps in the run.
      image_bytes: one example's image as sent to the devices.
      text_bytes: one example's padded text and mask as sent to the devices.
      token_bytes: the embedding of one token.
    """

    num_params: int
    state: dict[str, int]
    checkpoint_bytes: int
    model_flops: float
    batch_size: int
    num_steps: int
    image_bytes: int
    text_bytes: int
    token_bytes: int


def figures(
    run: Run, topology: Topology, compiled: Compiled | None, fast: bool, memory: int
) -> dict[str, Any]:
    """Returns the plan of a run on a topology.

    Args:
      compiled: None if the topology has no compiler; memory and time are then lower bounds.
      fast: whether the program was compiled with the least effort.
      memory: bytes that a program can use on one chip.
    """
    chips = topology.num_chips
    out: dict[str, Any] = {
        "parameters": run.num_params,
        "checkpoint_bytes": run.checkpoint_bytes,
        "memory": _memory(run, compiled, memory),
        "flops": {
            "model_per_step": run.model_flops,
            "model_per_image": run.model_flops / run.batch_size,
            "model_per_chip": run.model_flops / chips,
        },
    }
    if compiled and compiled.text:
        program = costs.count(hlo.parse(compiled.text))
        step = roofline.estimate(program, compiled.cost, topology, fast)
        out["flops"] |= _compiled_flops(run, chips, step.flops)
        out["step"] = {**dataclasses.asdict(step), "roofline_s": step.roofline_s}
        out |= _pace(run, topology, step.step_s, step.flops)
    elif compiled is None and topology.chip.peak_flops:
        out |= _pace(run, topology, run.model_flops / chips / topology.chip.peak_flops, 0.0)
    return out


def dollars(pace: dict[str, Any], price_per_chip_hour: float) -> dict[str, float]:
    """Returns the cost of the whole run and of 1,000 steps; extends the section "pace"."""
    total = pace["chip_hours"] * price_per_chip_hour
    return {
        "price_per_chip_hour": price_per_chip_hour,
        "dollars": total,
        "dollars_per_1000_steps": total / pace["num_steps"] * 1000,
    }


def _memory(run: Run, compiled: Compiled | None, available: int) -> dict[str, Any]:
    needed = compiled.needed if compiled else sum(run.state.values())
    return {
        "state": run.state,
        "program": compiled.memory if compiled else {},
        "needed": needed,
        "available": available,
        "fits": needed <= available,
    }


def _compiled_flops(run: Run, chips: int, per_chip: float) -> dict[str, float]:
    return {
        "compiled_per_chip": per_chip,
        "compiled_per_step": per_chip * chips,
        "compiled_per_image": per_chip * chips / run.batch_size,
        "ratio": per_chip * chips / run.model_flops,
    }


def _pace(run: Run, topology: Topology, step_s: float, flops: float) -> dict[str, Any]:
    """Returns the sections that follow from the time of a step: pace and input.

    Args:
      flops: those of one chip in one step, with recomputation.
    """
    chips, peak = topology.num_chips, topology.chip.peak_flops
    per_host = run.batch_size / step_s / topology.num_hosts
    read = run.image_bytes + TOKENS_READ * run.token_bytes
    return {
        "pace": {
            "step_s": step_s,
            "images_per_s": run.batch_size / step_s,
            "mfu": run.model_flops / chips / step_s / peak,
            "hfu": flops / step_s / peak,
            "num_steps": run.num_steps,
            "days": run.num_steps * step_s / 86_400,
            "chip_hours": run.num_steps * step_s * chips / 3600,
        },
        "input": {
            "hosts": topology.num_hosts,
            "images_per_s_per_host": per_host,
            "padded_bytes_per_s_per_host": per_host * (run.image_bytes + run.text_bytes),
            "read_bytes_per_s_per_host": per_host * read,
            "tokens_read": TOKENS_READ,
        },
    }
