"""Parses the HLO text of a compiled program and finds how often each instruction runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (\S.*?) ([a-z][a-z0-9\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line, `name = shape opcode(operands), ...`; `rest` is all text after "opcode("."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    is_root: bool = False

    def attribute(self, pattern: str) -> str:
        """Returns the first group of the first match of `pattern` in `rest`, or ""."""
        found = re.search(pattern, self.rest)
        return found[1] if found else ""

    def number(self, before: str) -> int:
        """Returns the number after `before` in `rest`. For a parameter, "^" gives its position."""
        return int(self.attribute(rf"{before}(\d+)"))


# Instructions by name, in order.
Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Program:
    """A parsed module.

    Attributes:
      computations: by name.
      entry: name of the computation that runs.
      num_partitions: number of devices.
    """

    computations: dict[str, Computation]
    entry: str
    num_partitions: int

    def called(self, instruction: Instruction, role: str) -> Computation:
        """Returns the computation that an instruction names as `role`, e.g. "body" or "calls"."""
        return self.computations.get(instruction.attribute(rf"\b{role}=%?([\w.\-]+)"), {})

    def walk(self) -> Iterator[tuple[Computation, Instruction, int, bool]]:
        """Yields (computation, instruction, number of runs, whether it is fused) for each one.

        Yields a fusion first, then the instructions in it, which are fused. A loop with an unknown
        trip count (see `trip_count`) counts as one iteration.
        """
        yield from self._walk(self.computations[self.entry], 1, False)

    def _walk(
        self, where: Computation, times: int, fused: bool
    ) -> Iterator[tuple[Computation, Instruction, int, bool]]:
        for i in where.values():
            yield where, i, times, fused
            if i.opcode == "while":
                trips = self.trip_count(where, i)
                yield from self._walk(self.called(i, "body"), times * (trips or 1), fused)
            elif i.opcode == "fusion":
                yield from self._walk(self.called(i, "calls"), times, True)
            elif i.opcode in ("call", "async-start"):
                role = "to_apply" if i.opcode == "call" else "calls"
                yield from self._walk(self.called(i, role), times, fused)
            elif i.opcode == "conditional":
                for name in re.findall(r"%([\w.\-]+)", i.attribute(r"computations=\{(.*?)\}")):
                    yield from self._walk(self.computations[name], times, fused)

    def trip_count(self, where: Computation, loop: Instruction) -> int | None:
        """Returns the trip count of a `while`, or None if it does not count up to a constant.

        jax.lax.scan counts one element of the loop's state from 0 to the scan's length.
        """
        if known := loop.attribute(r'known_trip_count":\{"n":"(\d+)"'):
            return int(known)
        condition = self.called(loop, "condition")
        found = self._comparison(condition)
        if found is None or found[0] != "LT":
            return None
        start = where.get(loop.operands[0])
        known = start is not None and start.opcode == "tuple"

        def value(name: str) -> int | None:
            source = condition.get(name)
            if source and source.opcode == "get-tuple-element" and known:
                return constant(where, start.operands[source.number("index=")])
            return constant(condition, name)

        first, last = map(value, found[1])
        if not known:  # the loop is a whole called computation; a scan counts from 0
            first = 0
        return None if first is None or last is None else max(last - first, 0)

    def _comparison(self, condition: Computation) -> tuple[str, list[str]] | None:
        """Returns the direction and both operands of a condition's comparison, fused or not."""
        for i in condition.values():
            if i.opcode == "compare":
                return i.attribute(r"direction=(\w+)"), list(i.operands)
            if i.opcode == "fusion" and (inner := self._comparison(self.called(i, "calls"))):
                names = [self.called(i, "calls")[name] for name in inner[1]]
                if all(n.opcode == "parameter" for n in names):
                    return inner[0], [i.operands[n.number("^")] for n in names]
        return None


def constant(where: Computation, name: str) -> int | None:
    """Returns the value of an integer constant or of a copy of one, else None."""
    found = where.get(name)
    while found and found.opcode in ("copy", "bitcast"):
        found = where.get(found.operands[0])
    text = found.rest.partition(")")[0] if found and found.opcode == "constant" else ""
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def parse(text: str) -> Program:
    """Parses the text that `compiled.as_text()` returns."""
    computations: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif found := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest = found.groups()
            arguments = re.split(r"\)(?:,|$)", rest, maxsplit=1)[0]
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            current[name] = Instruction(name, shape, opcode, operands, rest, bool(root))
    partitions = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    return Program(computations, entry, int(partitions[1]) if partitions else 1)


def arrays(shape: str) -> list[tuple[float, tuple[int, ...]]]:
    """Returns (bytes per element, dimensions) of each array in a shape, which may be a tuple."""
    return [
        (
            1.0 if kind == "pred" else int(bits or 0) / 8,
            tuple(map(int, sides.split(",") * (sides != ""))),
        )
        for kind, bits, sides in _ARRAY.findall(shape)
    ]
