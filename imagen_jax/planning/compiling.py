"""Compiles ahead of time and caches results on disk. A program too large for a chip is a result."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.metadata
import json
import re
import time
from pathlib import Path
from typing import Any

import jax

from imagen_jax.common.files import replacing

COST_KEYS = ("flops", "bytes accessed", "optimal_seconds")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_AMOUNT = r"([\d.]+)([KMGT]?)"
# XLA has two messages: one for the whole program, one for temporaries that alone are too large.
_TOO_LARGE = (
    re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm"),
    re.compile(rf"\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The parts of a compiled program that a plan needs.

    Attributes:
      memory: bytes on one device: arguments, outputs, aliased (outputs that reuse the memory of
        arguments), temporaries, code. Empty if the program is too large.
      cost: the scalars COST_KEYS of XLA's cost analysis.
      text: the optimized HLO; empty if the program is too large.
      needed: total bytes on one device; from the compiler's error if the program is too large.
      seconds: time that compiling took.
      cached: whether the result comes from the cache.
    """

    memory: dict[str, int]
    cost: dict[str, float]
    text: str
    needed: float
    seconds: float
    cached: bool = False


def effort(fast: bool) -> dict[str, Any]:
    """Returns compiler options: none, or with `fast` this JAX version's option for low effort."""
    if not fast:
        return {}
    if jax.__version_info__ >= (0, 12):
        return {"optimization_level": "O1"}
    return {"exec_time_optimization_effort": -1.0}


def compile_step(lowered: Any, target: str, options: dict[str, Any], cache: Path) -> Compiled:
    """Compiles a lowered program, or reads the result from the cache.

    Args:
      lowered: from `jitted.lower(...)`, for the devices to compile for.
      target: name of the topology.
      options: compiler options.
      cache: folder of results; created if missing.

    Raises:
      jax.errors.JaxRuntimeError: the compiler fails for a reason other than memory.
    """
    path = cache / f"{_key(lowered, target, options)}.json.gz"
    if path.exists():
        with contextlib.suppress(OSError, ValueError, TypeError):
            saved = json.loads(gzip.decompress(path.read_bytes()))
            return dataclasses.replace(Compiled(**saved), cached=True)
    compiled = _compile(lowered, options)
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode()))
    return compiled


def _key(lowered: Any, target: str, options: dict[str, Any]) -> str:
    """Hashes everything that the result depends on."""
    parts = [target, jax.__version__, compiler_version(), json.dumps(options)]
    return hashlib.sha256("\n".join([*parts, lowered.as_text()]).encode()).hexdigest()[:32]


def compiler_version() -> str:
    """Returns the version of libtpu; "" if it is not installed."""
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _compile(lowered: Any, options: dict[str, Any]) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
        needed = too_large(str(e))
        if needed is None:
            raise
        return Compiled({}, {}, "", needed, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    stats, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    memory = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    needed = sum(memory.values()) - 2 * memory["aliased"]
    scalars = {key: float(cost[key]) for key in COST_KEYS if key in cost}
    return Compiled(memory, scalars, compiled.as_text(), needed, seconds)


def too_large(message: str) -> float | None:
    """Returns the bytes a program needs, parsed from an out-of-memory error; else None."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return float(found[1]) * _UNITS[found[2]]
    return None
