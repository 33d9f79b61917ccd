"""Counts a compiled program's FLOPs, memory traffic and collectives from its HLO text.

XLA's own analysis counts a loop body once and leaves out collectives; here every operation counts
as often as it runs. FLOPs and bytes follow XLA's rules (xla/service/hlo_cost_analysis.cc), but
FLOPs cover only convolutions and matrix products.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

from imagen_jax.planning.hlo import Computation, Instruction, Program, arrays

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# All-reduces between slices, which libtpu's runtime does on the hosts, over the network.
BETWEEN_SLICES = "between-slices"
# Memory space of offloaded arrays.
HOST_MEMORY = "S(5)"
# Opcodes that move nothing: they name existing data, or their parts are counted elsewhere.
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "call"}
FREE |= {"while", "conditional", "partition-id", "async-start", "async-update", "async-done"}
# Custom calls that move nothing: they name adjacent arrays as one.
FREE_CALLS = ("ConcatBitcast",)
# Larger cycle counts are the compiler's placeholder for no estimate.
NO_ESTIMATE = 10**15


@dataclasses.dataclass
class Operation:
    """One operation, which every device runs `times` times per step.

    Attributes:
      times: runs per step.
      flops: FLOPs of its convolutions and matrix products, per run.
      bytes: bytes read and written per run, including on-chip memory.
      cycles: the compiler's estimate of its cycles per run; 0 if there is none.
      waits_for: bytes received from other devices while this one is idle; 0 for asynchronous
        collectives.
    """

    times: int
    flops: float = 0.0
    bytes: float = 0.0
    cycles: int = 0
    waits_for: float = 0.0


@dataclasses.dataclass(frozen=True)
class Costs:
    """A program's costs on one device.

    Attributes:
      operations: every operation with a cost.
      collectives: for each kind, their number ("count") and the bytes that one device receives
        ("bytes").
      host_bytes: bytes copied to the host's memory and back.
      unknown_loops: number of loops whose trip count is unknown; each counts as one iteration.
    """

    operations: list[Operation]
    collectives: dict[str, dict[str, float]]
    host_bytes: float = 0.0
    unknown_loops: int = 0


def count(program: Program) -> Costs:
    """Counts a program's costs on one device."""
    operations, unknown, host_bytes = [], 0, 0.0
    table = {kind: {"count": 0, "bytes": 0.0} for kind in (*COLLECTIVES, BETWEEN_SLICES)}
    for where, i, times, fused in program.walk():
        unknown += i.opcode == "while" and program.trip_count(where, i) is None
        if i.opcode == "copy-start" and HOST_MEMORY in i.shape:
            host_bytes += times * _first_size(i.shape)  # source and destination have the same size
        if not fused:
            operations.append(Operation(times, 0.0, _moved(program, where, i), _cycles(i)))
        # A fusion's instructions follow the fusion itself.
        operations[-1].flops += _flops(where, i)
        kind = i.opcode.removesuffix("-start")
        if kind == "all-reduce" and fused:  # fused with the slice that a device keeps
            kind = "reduce-scatter"
        if kind == "recv" and "megascale" in i.rest:
            kind = BETWEEN_SLICES
        if kind in table:
            size = received(program, where, i, kind)
            table[kind]["count"] += times
            table[kind]["bytes"] += times * size
            if i.opcode in COLLECTIVES:
                operations[-1].waits_for += size
    operations = [o for o in operations if o.flops or o.bytes or o.cycles or o.waits_for]
    found = {k: v for k, v in table.items() if v["count"]}
    return Costs(operations, found, host_bytes, unknown)


def received(program: Program, where: Computation, i: Instruction, kind: str) -> float:
    """Returns the bytes a device receives in a collective, by the best algorithm on a ring.

    An all-gather receives every shard but its own; a reduce-scatter receives every other device's
    contribution to its own shard; an all-reduce does both in turn.

    Args:
      kind: one of COLLECTIVES, which may differ from the instruction's opcode, or BETWEEN_SLICES.
    """
    if kind == BETWEEN_SLICES:
        return _received_from_slices(i)
    size = sum(_size(where[name].shape) for name in i.operands if name in where)
    group = group_size(i, program.num_partitions)
    factor = {
        "all-gather": group - 1,
        "all-reduce": 2 * (group - 1) / group,
        "collective-permute": 1,
    }.get(kind, (group - 1) / group)
    return factor * size


def _received_from_slices(i: Instruction) -> float:
    """Returns the bytes a device receives from other slices; the target attribute lists those."""
    slices = i.attribute(r'_xla_megascale_target="\{([\d,]+)\}').count(",") + 1
    reduced = i.attribute(r'_xla_megascale_transfer_type="(\w+)"') == "ALL_REDUCE"
    return _first_size(i.shape) * (2 * (slices - 1) / slices if reduced else 1)


def group_size(i: Instruction, num_devices: int) -> int:
    """Returns the number of devices in each group of a collective.

    HLO writes groups in one of three ways: lists, {{0,1},{2,3}}; [groups,size]<=[devices]; or a
    mesh and the participating axes, mesh['x'=2,'y'=4] {'y'}.
    """
    if first := i.attribute(r"replica_groups=\{\{([\d,]+)\}"):
        return len(first.split(","))
    if size := i.attribute(r"replica_groups=\[\d+,(\d+)\]"):
        return int(size)
    mesh = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", i.rest)
    if not mesh:
        return num_devices
    sides = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
    # Part of an axis is written 'x':(before)size.
    axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
    return math.prod(int(part or sides[axis]) for axis, part in axes)


def _size(shape: str) -> float:
    return sum(width * math.prod(sides) for width, sides in arrays(shape))


def _first_size(shape: str) -> float:
    width, sides = arrays(shape)[0]
    return width * math.prod(sides)


def _cycles(i: Instruction) -> int:
    cycles = int(i.attribute(r'"estimated_cycles":"(\d+)"') or 0)
    return cycles if cycles < NO_ESTIMATE else 0


def _flops(where: Computation, i: Instruction) -> float:
    if i.opcode not in ("convolution", "dot"):
        return 0.0
    (_, out), (_, left), (_, right) = (
        arrays(shape)[0] for shape in (i.shape, *(where[name].shape for name in i.operands[:2]))
    )
    if i.opcode == "dot":
        contracted = i.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in contracted.split(",") if d)
    lhs, rhs, result = re.split("_|->", i.attribute(r"dim_labels=([\w\->]+)"))
    window = i.attribute(r"window=\{(.*?)\}")
    places = 1
    for d in sorted(set(result) & set("0123456789")):
        sides = (left[lhs.index(d)], right[rhs.index(d)], out[result.index(d)])
        places *= _valid_places(*sides, *_window(window, int(d)))
    groups = int(i.attribute(r"batch_group_count=(\d+)") or 1)
    # The kernel's input features already exclude other feature groups.
    features = right[rhs.index("i")] * right[rhs.index("o")]
    return 2.0 * places * features * left[lhs.index("b")] / groups


def _window(text: str, d: int) -> tuple[int, int, int, int]:
    """Returns one spatial dimension's stride, low padding, input dilation and kernel dilation."""
    words = dict(part.split("=") for part in text.split())

    def get(key: str) -> str:
        return words[key].split("x")[d] if key in words else "1"

    pad = int(words["pad"].split("x")[d].split("_")[0]) if "pad" in words else 0
    return int(get("stride")), pad, int(get("lhs_dilate")), int(get("rhs_dilate"))


@functools.lru_cache(maxsize=4096)
def _valid_places(
    size: int, kernel: int, out: int, stride: int, pad: int, dilation: int, kernel_dilation: int
) -> int:
    """Counts (output, kernel) position pairs that fall on a pixel, not on padding or a hole."""
    reach = (size - 1) * dilation
    at = (o * stride + k * kernel_dilation - pad for o in range(out) for k in range(kernel))
    return sum(0 <= place <= reach and place % dilation == 0 for place in at)


def _moved(program: Program, where: Computation, i: Instruction) -> float:
    """Returns the bytes an operation reads and writes; a sliced array counts as its slice."""
    if i.opcode in FREE or i.opcode.endswith(("-start", "-done")):
        return 0.0  # an array copied ahead of its use counts where it is used
    if i.attribute(r'custom_call_target="(\w+)"') in FREE_CALLS:
        return 0.0
    operands = [_size(where[name].shape) if name in where else 0.0 for name in i.operands]
    if i.opcode in ("dynamic-slice", "slice"):
        return 2 * _size(i.shape)
    if i.opcode == "dynamic-update-slice":
        return 2 * operands[1]
    if i.opcode != "fusion":
        return sum(operands) + _size(i.shape)
    inside = program.called(i, "calls")
    users: dict[str, list[Instruction]] = {}
    for user in inside.values():
        for name in user.operands:
            users.setdefault(name, []).append(user)
    written = _size(i.shape)
    for p in (p for p in inside.values() if p.opcode == "parameter"):
        number = p.number("^")
        used = users.get(p.name, [])
        if used and all(u.opcode == "dynamic-slice" and u.operands[0] == p.name for u in used):
            operands[number] = sum(_size(u.shape) for u in used)
        elif used and all(_updates(u, p.name) for u in used):
            # An update in place touches only the updated part.
            updates = sum(_size(inside[u.operands[1]].shape) for u in used)
            written += updates - _size(p.shape)
            operands[number] = 0.0
    return sum(operands) + max(written, 0.0)


def _updates(user: Instruction, name: str) -> bool:
    return user.opcode == "dynamic-update-slice" and user.operands[0] == name
