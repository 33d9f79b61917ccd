"""Strategies of Hypothesis that damage valid files: as bytes, or as JSON documents."""

from __future__ import annotations

import copy
import json
import math
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

Bytes = st.SearchStrategy[bytes]
EXTREMES = (0, 1, 2**15, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
ATOMS = (
    *(None, True, False, 0, -1, 1.5, 2**31, 2**53, 2**63, 10**21, 10**400, 1e308),
    *(math.inf, -math.inf, math.nan, "", "\0", "a", "9" * 5000, "../../x", "/etc/passwd", "\ud800"),
    *("{0}", "{DATASET.__class__}", "{", [], {}, [[]], {"a": {"b": 1}}, [None], ["x"], [2**63]),
)
_DEEP = b"[" * 100_000


@st.composite
def damaged(draw: Callable, files: Sequence[bytes], most: int = 4) -> bytes:
    """A file with up to `most` changes; now and then something else altogether."""
    if draw(st.integers(0, 19)) == 0:
        return draw(st.one_of(st.binary(max_size=200), st.sampled_from([_DEEP, b"\0" * 4096])))
    data = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        kind = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "number", "zero"]))
        if kind == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del data[at : at + draw(st.integers(1, 4096))]
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=32))
        elif kind == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        elif kind == "number":
            data[at : at + 8] = struct.pack("<Q", draw(st.sampled_from(EXTREMES)))
        elif kind == "zero":
            size = draw(st.integers(1, 64))
            data[at : at + size] = bytes(len(data[at : at + size]))
    return bytes(data)


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yields the path of every value in a JSON document."""
    if path:
        yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        if isinstance(inner, (dict, list)):
            yield from _places(inner, (*path, key))
        else:
            yield (*path, key)


@st.composite
def damaged_json(draw: Callable, document: Any) -> Any:
    """A document with a few values replaced or removed, or keys renamed."""
    changed = copy.deepcopy(document)
    atoms = st.one_of(st.sampled_from(ATOMS), st.text(max_size=8), st.integers(), st.floats())
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(changed))
        if not places:
            break
        *path, last = draw(st.sampled_from(places))
        node = changed
        for key in path:
            node = node[key]
        kind = draw(st.sampled_from(["replace", "replace", "remove", "rename"]))
        if kind == "replace":
            node[last] = copy.deepcopy(draw(atoms))
        elif kind == "remove" or isinstance(node, list):
            del node[last]
        else:
            node[draw(st.text(max_size=8))] = node.pop(last)
    return changed


def json_bytes(document: Any) -> Bytes:
    """A damaged JSON file: damaged as a document, or as bytes."""
    whole = json.dumps(document).encode()

    def dumped(value: Any) -> bytes:
        # Python's own dumps refuses integers of more than 4,300 digits.
        return json.dumps(value).encode("utf-8", "surrogatepass")

    return st.one_of(damaged_json(document).map(dumped), damaged([whole]))


class Target(NamedTuple):
    """A reader.

    Attributes:
      inputs: strategy of its input.
      read: (input, an own folder) -> whatever, by calling the reader.
    """

    inputs: st.SearchStrategy
    read: Callable[[Any, Path], Any]
