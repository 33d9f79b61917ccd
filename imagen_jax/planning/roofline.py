"""How long a step takes at the least, by what it computes, moves and sends; and how long it may.

Bounds: all FLOPs at the chip's peak, all bytes at its memory's bandwidth, all that comes from other
chips at the bandwidth of its links; where there is any, also what comes from other slices at the
chip's share of the network, and what goes to the host's memory and back at that of PCIe. The
compiler's own estimate stands beside them.
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
      flops: with recomputation, by XLA's count, loops counted as often as they run.
      bytes: read and written, by the same count.
      collectives: of each kind, how many, and the bytes that the chip receives.
      host_bytes: that go to the host's memory and come back.
      bounds: the least time for "compute", "memory" and "interconnect", for "network" between
        slices and for "host".
      binds: the largest of them, the roofline.
      compiler_s: the compiler's estimate of what the chip itself does, or None if it has no sane
        one.
      source: what that is, "cycles" or "optimal_seconds".
      exposed_s: in collectives during which the chip does nothing else; what is started ahead
        counts as hidden, though a little of it may not be.
      step_s: the prediction: the compiler's estimate, or else the bound of computing and memory,
        and what is exposed; no less than all that leaves the chip takes.
      unknown_loops: loops that were counted as one turn for want of their number.
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
        """The least time that a step can take."""
        return self.bounds[self.binds]


def estimate(costs: Costs, xla: dict[str, float], topology: Topology, fast: bool) -> Estimate:
    """Estimates a step.

    Args:
      costs: counted in the program's text.
      xla: the scalars of `compiled.cost_analysis()`, in which the body of a loop counts once.
      fast: compiled with low effort. Then the compiler has not tuned its kernels, and its cycles
        are those of kernels that nobody should run: the optimum that it gives is nearer.
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
    # An operation whose time XLA does not know counts as minus one second in its optimum, which is
    # then below what the FLOPs alone take.
    sane = [(s, n) for s, n in ((cycles, "cycles"), (optimal, "optimal_seconds")) if s > 0]
    compiler, source = next((c for c in sane if c[0] >= bounds["compute"]), (None, ""))
    waits_for = sum(o.times * o.waits_for for o in costs.operations)
    if fast:  # the least effort starts nothing ahead; training's program starts these
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
    """By how much more a cost is, because of loops, than with each operation counted once."""
    once = sum(of(o) for o in costs.operations)
    return sum(o.times * of(o) for o in costs.operations) / once if once else 1.0


def _seconds(o: Operation, topology: Topology) -> float:
    return max(o.flops / topology.chip.peak_flops, o.bytes / topology.chip.hbm_bytes_per_s)


def _cycle_seconds(costs: Costs, topology: Topology) -> float:
    """The compiler's cycles, one operation after the other; the roofline where it has none.

    Without the collectives that the chip waits for.
    """
    clock = topology.chip.clock_hz
    if not any(o.cycles for o in costs.operations):
        return 0.0
    own = (o for o in costs.operations if not o.waits_for)
    return sum(o.times * (o.cycles / clock or _seconds(o, topology)) for o in own)
