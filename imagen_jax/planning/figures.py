"""Every figure of a plan, as nested dicts that JSON can hold. Bytes and FLOPs are plain numbers."""

from __future__ import annotations

import dataclasses
from typing import Any

from imagen_jax.devices.topologies import Topology
from imagen_jax.planning import costs, hlo, roofline
from imagen_jax.planning.compiling import Compiled

# A caption of the web has about as many tokens; what is stored and read is not padded.
TOKENS_READ = 20


@dataclasses.dataclass(frozen=True)
class Run:
    """What is to be trained, however it is compiled.

    Attributes:
      num_params: of the network.
      state: bytes on one device, by kind: weights, ema, optimizer, gradients, batch.
      checkpoint_bytes: weights, EMA and optimizer state of all devices, each part once.
      model_flops: of one step of the whole batch, forward and backward, nothing computed twice.
      image_bytes, text_bytes, token_bytes: of one example as it goes to the devices, and of one
        token of its caption.
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
    """The plan of a run on a topology.

    Args:
      compiled: None where there is no compiler for it; then memory and time are lower bounds.
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
    """What follows from the time of a step; flops are those of one chip, with recomputation."""
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
