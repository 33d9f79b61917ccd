"""Measures where the time to the first step goes."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """The time since the start, split into parts without gaps, so they sum to the whole.

    Attributes:
      seconds: seconds by name of the part, in order of first appearance.
    """

    def __init__(self, age: float = 0.0):
        """Starts counting `age` seconds ago."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - age

    def done(self, part: str) -> None:
        """Ends a part: adds the time since the last call to it. Parts with one name are summed."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def summary(self) -> str:
        """Returns one line for the log, without parts that took no time."""
        shown = {name: f"{seconds:.1f}" for name, seconds in self.seconds.items()}
        parts = ", ".join(f"{name} {text}" for name, text in shown.items() if text != "0.0")
        return f"first step done after {sum(self.seconds.values()):.1f} s: {parts}"

    def metrics(self) -> dict[str, float]:
        """Returns the parts as metrics: "startup/data_opening" and so on, and "startup/total"."""
        parts = {name.replace(" ", "_"): seconds for name, seconds in self.seconds.items()}
        parts["total"] = sum(self.seconds.values())
        return {f"startup/{name}": seconds for name, seconds in parts.items()}


def process_age() -> float:
    """Returns the seconds since this process started, including imports.

    Without /proc, returns the CPU time used so far, which is most of it.
    """
    try:
        # The start is field 22, in ticks since boot; field 2, the name, may contain spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()
