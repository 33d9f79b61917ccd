"""Where the time to the first step goes."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Startup:
    """Seconds by part. A part ends where the next one starts, so they sum to the whole.

    Attributes:
      seconds: by name of the part, in the order in which they first came.
    """

    def __init__(self, age: float = 0.0):
        """Starts `age` seconds ago."""
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter() - age

    def done(self, part: str) -> None:
        """Counts the time since the last call for `part`, which may come more than once."""
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now

    def summary(self) -> str:
        """One line for people, without what took no time."""
        shown = {name: f"{seconds:.1f}" for name, seconds in self.seconds.items()}
        parts = ", ".join(f"{name} {text}" for name, text in shown.items() if text != "0.0")
        return f"first step done after {sum(self.seconds.values()):.1f} s: {parts}"

    def metrics(self) -> dict[str, float]:
        """The parts as metrics, startup/data_opened and so on, and startup/total."""
        parts = {name.replace(" ", "_"): seconds for name, seconds in self.seconds.items()}
        parts["total"] = sum(self.seconds.values())
        return {f"startup/{name}": seconds for name, seconds in parts.items()}


def process_age() -> float:
    """Seconds since this process was started, imports and all.

    Where there is no /proc, the CPU time that it has used so far, which is most of it.
    """
    try:
        # The 22nd field, in ticks since boot; the second, the name, may hold spaces.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        return time.process_time()
