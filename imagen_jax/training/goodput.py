"""Goodput: where the wall time of a run goes, over all its starts, in GOODPUT of the workdir.

At every moment exactly one part is counted, so the parts sum to the wall time from the first start
to the last heartbeat. Two parts are known only afterwards. "down" is the time between the last
heartbeat of a start and the next start; it includes a start that ended before its first step.
"lost_steps" are steps that a later start, or a return to a checkpoint, repeated: of the time that a
start spent in its steps, the share of those steps.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import read_json, write_json
from imagen_jax.runs.workdir import GOODPUT
from imagen_jax.training.startup import Startup

BEAT_S = 30.0  # seconds between heartbeats

PARTS = (
    *("steps", "lost_steps", "compile", "data"),
    *("checkpoints", "evaluation", "startup", "down"),
)
# Part of the startup -> part here; all others are "startup".
OF_STARTUP = {
    "compile": "compile",
    "data building": "data",
    "data opening": "data",
    "first batch": "data",
    "restore": "checkpoints",
    "evaluation": "evaluation",
    "first step": "steps",
}


class Goodput:
    """Counts the seconds of this start, and adds them to those of the earlier ones.

    Counting begins after the first step, with what came before as the startup has measured it.
    """

    def __init__(self, workdir: Path, startup: Startup, step: int, writes: bool = True):
        """Reads the earlier starts.

        Args:
          step: the step that this start begins with; later steps of earlier starts are lost.
          writes: whether this process writes GOODPUT.
        """
        self._path, self._startup, self._writes = workdir / GOODPUT, startup, writes
        self._starts = _read(self._path) if writes else []
        for start in self._starts:
            _lose(start, step)
        seconds = dict.fromkeys(PARTS[:-1], 0.0)
        self._now = {"began": 0.0, "from_step": step, "step": step, "seconds": seconds}
        self._part, self._last, self._beat = "", 0.0, 0.0

    def begin(self) -> None:
        """Begins to count, once the first step is done."""
        parts = self._startup.seconds
        for name, seconds in parts.items():
            self._now["seconds"][OF_STARTUP.get(name, "startup")] += seconds
        self._now["began"] = time.time() - sum(parts.values())
        self._starts.append(self._now)
        self._part, self._last = "steps", time.perf_counter()

    @contextlib.contextmanager
    def spending(self, part: str) -> Iterator[None]:
        """Counts the block as `part`, one of PARTS, instead of as steps."""
        before = self._part
        self._count()
        self._part = before and part
        try:
            yield
        finally:
            self._count()
            self._part = before

    def _count(self) -> None:
        now = time.perf_counter()
        if self._part:
            self._now["seconds"][self._part] += now - self._last
        self._last = now

    def beat(self, step: int) -> None:
        """Notes the step that training has reached; writes, if the last heartbeat is old."""
        self._now["step"] = step
        if time.perf_counter() > self._beat + BEAT_S:
            self.write()

    def rewind(self, step: int) -> None:
        """Counts the steps after `step` as lost, because training goes back to there."""
        self._count()
        for start in self._starts:
            _lose(start, step)

    def write(self) -> None:
        """Writes the seconds up to now; a failure never ends the run."""
        self._count()
        self._beat = self._last
        if self._writes and self._part:
            with contextlib.suppress(OSError):  # whatever writes next reports it
                write_json(self._path, {"seconds": totals(self._starts), "starts": self._starts})

    close = write

    def metrics(self) -> dict[str, float]:
        """Returns the share of the wall time so far that went into steps that count."""
        self._count()
        seconds = totals(self._starts)
        whole = sum(seconds.values())
        return {"goodput": seconds["steps"] / whole} if self._writes and whole else {}


def totals(starts: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the seconds of each of PARTS over all starts."""
    out = {part: sum(start["seconds"][part] for start in starts) for part in PARTS[:-1]}
    ends = [start["began"] + sum(start["seconds"].values()) for start in starts]
    gaps = [after["began"] - end for end, after in zip(ends, starts[1:], strict=False)]
    return {**out, "down": sum(max(0.0, gap) for gap in gaps)}


def _lose(start: dict[str, Any], step: int) -> None:
    """Moves the time of the steps after `step` from "steps" to "lost_steps"."""
    first, last, seconds = start["from_step"], start["step"], start["seconds"]
    if last <= step:
        return
    share = (last - max(step, first)) / (last - first) if last > first else 1.0
    lost = share * seconds["steps"]
    seconds["steps"] -= lost
    seconds["lost_steps"] += lost
    start["from_step"], start["step"] = min(first, step), step


def _read(path: Path) -> list[dict[str, Any]]:
    """Returns the earlier starts; none if the file is missing or damaged."""
    if not path.exists():
        return []
    try:
        starts = read_json(path)["starts"]
        numbers = [s[k] + 0.0 for s in starts for k in ("began", "from_step", "step")]
        numbers += [s["seconds"][part] + 0.0 for s in starts for part in PARTS[:-1]]
    except (UserError, KeyError, TypeError) as e:
        log.warning("%s is damaged; goodput is counted from this start (%s)", path, e)
        return []
    return starts
