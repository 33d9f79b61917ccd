"""STARTS: one line of JSON per start of a run, with all that it ran with and what had changed."""

from __future__ import annotations

import dataclasses
import json
import platform
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from imagen_jax.common.cli import log
from imagen_jax.common.files import replacing
from imagen_jax.common.version import code_version
from imagen_jax.config import Config
from imagen_jax.runs.workdir import STARTS

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def record(workdir: Path, config: Config, step: int, restored: str = "") -> None:
    """Appends this start to STARTS; logs what differs from the start before it.

    Args:
      step: the step that training begins after.
      restored: where its state is from: "workdir", "local_dir", or "" for a new run.
    """
    path = workdir / STARTS
    text = path.read_bytes() if path.exists() else b""
    now = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "restored": restored,
        "seed": config.seed,
        "host": socket.gethostname(),
        "command": sys.argv[1:],
        "python": platform.python_version(),
        "versions": _versions(),
        "devices": {
            "count": jax.device_count(),
            "kind": jax.devices()[0].device_kind,
            "processes": jax.process_count(),
        },
        "config": dataclasses.asdict(config),
    }
    now = json.loads(json.dumps(now))  # so that tuples compare with lists
    before = _last(text)
    now["changes"] = differences(before, now) if before else {}
    # A crash can have left half a line.
    line = "\n" * bool(text and not text.endswith(b"\n")) + json.dumps(now) + "\n"
    with replacing(path) as temporary:  # whole, because a bucket cannot append
        temporary.write_bytes(text + line.encode())
    for name, (old, new) in now["changes"].items():
        log.info("changed since the last start: %s was %r, is %r", name, old, new)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Returns {dotted key: [before, now]} of what may explain another behavior of the run."""
    keys = ("python", "versions", "devices", "config")
    old, new = ({k: start.get(k) for k in keys} for start in (before, now))
    old, new = dict(_flatten(old)), dict(_flatten(new))
    names = sorted(old.keys() | new.keys())
    return {n: [old.get(n), new.get(n)] for n in names if old.get(n) != new.get(n)}


def _versions() -> dict[str, str]:
    versions = {"imagen_jax": code_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = ""
    return versions


def _last(text: bytes) -> dict[str, Any]:
    """Returns the last line that is whole; {} if there is none."""
    for line in reversed(text.split(b"\n")):
        try:
            start = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(start, dict):
            return start
    return {}


def _flatten(values: Mapping[str, Any], prefix: str = ""):
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
