"""Ahead-of-time compilation, remembered on disk; a program too large for the chip is an answer."""

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
# XLA says it in one of two ways, by whether the temporaries alone are too much.
_TOO_LARGE = (
    re.compile(rf"Used {_AMOUNT} of {_AMOUNT} hbm"),
    re.compile(rf"\({_AMOUNT}\) exceeds available HBM \({_AMOUNT}\)"),
)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What is kept of a compiled program.

    Attributes:
      memory: bytes on one device: arguments, outputs, aliased (outputs that lie where arguments
        did), temporaries, code. Empty if the program is too large.
      cost: the scalars COST_KEYS of XLA's cost analysis.
      text: the optimized HLO.
      needed: bytes on one device in all; if the program is too large, as the compiler says.
      seconds: that compiling took.
      cached: whether it was, at another time.
    """

    memory: dict[str, int]
    cost: dict[str, float]
    text: str
    needed: float
    seconds: float
    cached: bool = False


def effort(fast: bool) -> dict[str, Any]:
    """Compiler options: with `fast` those of the least effort, by this JAX's name for it."""
    if not fast:
        return {}
    if jax.__version_info__ >= (0, 12):
        return {"optimization_level": "O1"}
    return {"exec_time_optimization_effort": -1.0}


def compile_step(lowered: Any, target: str, options: dict[str, Any], cache: Path) -> Compiled:
    """Compiles a lowered program, or finds in `cache` what compiling it once gave.

    Args:
      lowered: from `jitted.lower(...)`, on devices to compile for.
      target: the topology's name.
      options: of the compiler.
      cache: a folder, made if it is not there.
    """
    path = cache / f"{_key(lowered, target, options)}.json.gz"
    if path.exists():
        with contextlib.suppress(OSError, ValueError, TypeError):
            kept = json.loads(gzip.decompress(path.read_bytes()))
            return dataclasses.replace(Compiled(**kept), cached=True)
    compiled = _compile(lowered, options)
    cache.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(gzip.compress(json.dumps(dataclasses.asdict(compiled)).encode()))
    return compiled


def _key(lowered: Any, target: str, options: dict[str, Any]) -> str:
    """A hash of all that the result depends on."""
    parts = [target, jax.__version__, compiler_version(), json.dumps(options)]
    return hashlib.sha256("\n".join([*parts, lowered.as_text()]).encode()).hexdigest()[:32]


def compiler_version() -> str:
    """The version of libtpu, "" if it is not installed."""
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
    kept = {key: float(cost[key]) for key in COST_KEYS if key in cost}
    return Compiled(memory, kept, compiled.as_text(), needed, seconds)


def too_large(message: str) -> float | None:
    """The bytes that a program wanted, from the compiler's error; None if it is another error."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _TOO_LARGE:
        if found := pattern.search(message):
            return float(found[1]) * _UNITS[found[2]]
    return None
