"""state.json says whether a run is running or how it ended, for people and supervisors."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from imagen_jax.common.errors import first_line
from imagen_jax.common.files import write_json
from imagen_jax.runs.workdir import STATE

HEARTBEAT_S = 30.0  # seconds between heartbeats


class RunState:
    """Writes state.json; a failure to write it never ends the run."""

    def __init__(self, workdir: Path, num_steps: int, writes: bool = True):
        self._path, self._writes = workdir / STATE, writes
        self._fields = {
            "state": "running",
            "step": 0,
            "num_steps": num_steps,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": time.time(),
        }
        self._beat = -HEARTBEAT_S

    def beat(self, step: int) -> None:
        """Writes the step that training has reached, if the last heartbeat is old."""
        self._fields["step"] = step
        if time.monotonic() > self._beat + HEARTBEAT_S:
            self._write()

    def end(self, state: str, step: int | None = None, reason: str = "") -> None:
        """Writes how the run ended: "finished", "preempted" or "failed"."""
        self._fields |= {"state": state} | ({"reason": reason} if reason else {})
        self._fields["step"] = self._fields["step"] if step is None else step
        self._write()

    def _write(self) -> None:
        self._beat = time.monotonic()
        if not self._writes:
            return
        with contextlib.suppress(OSError):  # whatever writes next reports it
            write_json(self._path, {**self._fields, "heartbeat": time.time()})


@contextlib.contextmanager
def recording(workdir: Path, num_steps: int, writes: bool = True) -> Iterator[RunState]:
    """Records that a run is running and, if the block raises, why it failed."""
    state = RunState(workdir, num_steps, writes)
    state.beat(0)
    try:
        yield state
    except BaseException as e:
        state.end("failed", reason=f"{type(e).__name__}: {first_line(e)}"[:500])
        raise
