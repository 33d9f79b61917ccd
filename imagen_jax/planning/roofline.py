"""Bounds and predicts the time of a training step.

| lower bound | amount | rate |
|---|---|---|
| compute | FLOPs | the chip's peak |
| memory | bytes read and written | bandwidth of the chip's memory |
| interconnect | bytes received from chips of the slice | bandwidth of all links of the chip |
| network | bytes received from other slices, if any | the chip's share of its host's bandwidth |
| host | bytes offloaded to the host and back, if any | bandwidth of PCIe |

The prediction uses the compiler's own estimate where there is a plausible one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from imagen_jax.devices.topologies import Topology
from imagen_jax.planning.costs import BETWEEN_SLICES, Costs, Operation


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One training step on one chip. Times are in seconds.

    Attributes:
      flops: FLOPs including recomputation, by XLA's count scaled for loops.
      bytes: bytes read and written, by the same count.
      collectives: for each kind, their number and the bytes the chip receives.
      host_bytes: bytes copied to the host's memory and back.
      bounds: lower bounds by name, see the module's table.
      binds: name of the largest bound, the roofline.
      compiler_s: the compiler's estimate of the chip's own work; None if it has no plausible one.
      source: where compiler_s comes from, "cycles" or "optimal_seconds"; "" if it is None.
      exposed_s: time in synchronous collectives, while the chip is idle. Asynchronous ones count
        as hidden, although a small part may not be.
      step_s: the prediction: compiler_s (or the larger of the compute and memory bounds) plus
        exposed_s, but at least the interconnect, network and host bounds.
      unknown_loops: number of loops whose trip count is unknown; each counts as one iteration.
    """

    flops: float
    bytes: float
    collectives: dict[str, dict[str, float]]
    host_bytes: float
    bounds: dict[str, float]
    binds: str
    compiler_s: float | None
    source: str
    exposed_s: float
    step_s: float
    unknown_loops: int = 0

    @property
    def roofline_s(self) -> float:
        """The largest lower bound."""
        return self.bounds[self.binds]


def estimate(costs: Costs, xla: dict[str, float], topology: Topology, fast: bool) -> Estimate:
    """Estimates a training step.

    Args:
      costs: counted in the program's text.
      xla: the scalars of `compiled.cost_analysis()`, which count a loop body once.
      fast: whether the program was compiled with low effort. The compiler then does not tune its
        kernels, so its cycles are far too many, and `optimal_seconds` is closer to training.
    """
    chip = topology.chip
    flops = xla["flops"] * _repeats(costs, lambda o: o.flops)
    moved = xla["bytes accessed"] * _repeats(costs, lambda o: o.bytes)
    received = {kind: row["bytes"] for kind, row in costs.collectives.items()}
    others = received.pop(BETWEEN_SLICES, 0.0)
    inside = sum(received.values())
    bounds = {
        "compute": flops / chip.peak_flops,
        "memory": moved / chip.hbm_bytes_per_s,
        "interconnect": inside / topology.ici_bytes_per_s if inside else 0.0,
    }
    if others:
        bounds["network"] = others / chip.network_bytes_per_s
    if costs.host_bytes:
        bounds["host"] = costs.host_bytes / chip.host_bytes_per_s
    binds = max(bounds, key=bounds.get)
    optimal = xla.get("optimal_seconds", 0.0) * _repeats(costs, lambda o: _seconds(o, topology))
    cycles = 0.0 if fast else _cycle_seconds(costs, topology)
    # XLA counts an operation of unknown time as minus one second, which makes optimal_seconds
    # smaller than the compute bound: such an estimate is not plausible.
    sane = [(s, n) for s, n in ((cycles, "cycles"), (optimal, "optimal_seconds")) if s > 0]
    compiler, source = next((c for c in sane if c[0] >= bounds["compute"]), (None, ""))
    waits_for = sum(o.times * o.waits_for for o in costs.operations)
    if fast:  # low effort makes every collective synchronous; training's all-gathers are not
        waits_for = max(0.0, waits_for - received.get("all-gather", 0.0))
    exposed = waits_for / topology.ici_bytes_per_s
    outside = (bounds.get(kind, 0.0) for kind in ("interconnect", "network", "host"))
    own = compiler or max(bounds["compute"], bounds["memory"])
    step = max(own + exposed, *outside)
    return Estimate(
        flops=flops,
        bytes=moved,
        collectives=costs.collectives,
        host_bytes=costs.host_bytes,
        bounds=bounds,
        binds=binds,
        compiler_s=compiler,
        source=source,
        exposed_s=exposed,
        step_s=step,
        unknown_loops=costs.unknown_loops,
    )


def _repeats(costs: Costs, of: Callable[[Operation], float]) -> float:
    """Returns the ratio of a cost with loops counted as they run to the same counted once."""
    once = sum(of(o) for o in costs.operations)
    return sum(o.times * of(o) for o in costs.operations) / once if once else 1.0


def _seconds(o: Operation, topology: Topology) -> float:
    return max(o.flops / topology.chip.peak_flops, o.bytes / topology.chip.hbm_bytes_per_s)


def _cycle_seconds(costs: Costs, topology: Topology) -> float:
    """Returns the sum of the compiler's cycles over operations, in seconds; 0 if it has none.

    An operation without cycles takes its roofline time. Synchronous collectives are left out.
    """
    clock = topology.chip.clock_hz
    if not any(o.cycles for o in costs.operations):
        return 0.0
    own = (o for o in costs.operations if not o.waits_for)
    return sum(o.times * (o.cycles / clock or _seconds(o, topology)) for o in own)
