"""A trace of a few steps, for XProf or TensorBoard."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError


def parse_steps(text: str, num_steps: int) -> range:
    """Parses --profile_steps=FIRST:LAST, both included; "" gives no steps.

    Raises:
      UserError: the text has another form, or LAST is beyond `num_steps`.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(\d+):(\d+)", text, re.ASCII)
    first, last = map(int, found.groups()) if found else (0, 0)
    if not 1 <= first <= last <= num_steps:
        raise UserError(
            f"--profile_steps is {text!r}; allowed: FIRST:LAST, steps from 1 to "
            f"{num_steps} (config.num_steps), for example 10:13"
        )
    return range(first, last + 1)


class Profile:
    """Trace of `steps` in `folder`; every process writes its own file of the same session.

    Starting and stopping wait for the devices, so the trace has complete steps.
    """

    def __init__(self, steps: Sequence[int], folder: Path):
        self._steps, self._folder = steps, Path(folder)
        # JAX names the file after the host, so processes on one host need separate folders.
        self._own = self._folder / f".process_{jax.process_index()}"
        self._running = False

    def starts(self, step: int) -> bool:
        """Returns whether to start the trace before `step`; a run may resume within `steps`."""
        return step in self._steps and not self._running

    def ends(self, step: int) -> bool:
        """Returns whether `step` is the last to trace."""
        return self._running and step == self._steps[-1]

    def start(self, state: Any) -> None:
        """Starts the trace once `state` is ready."""
        jax.block_until_ready(state)
        shutil.rmtree(self._own, ignore_errors=True)
        jax.profiler.start_trace(self._own)
        self._running = True

    def stop(self, step: int, state: Any) -> None:
        """Stops the trace after `step` once `state` is ready, and writes it."""
        jax.block_until_ready(state)
        self.close()
        log.info(
            "step %d  profile: tensorboard --logdir=%s (pip install xprof)", step, self._folder
        )

    def close(self) -> None:
        """Stops and writes the trace if it is still running."""
        if not self._running:
            return
        self._running = False
        jax.profiler.stop_trace()
        name = f"steps_{self._steps[0]}_to_{self._steps[-1]}"
        session = self._folder / "plugins" / "profile" / name
        session.mkdir(parents=True, exist_ok=True)
        for file in self._own.glob("plugins/profile/*/*"):
            file.replace(session / f"process_{jax.process_index()}.{file.name}")
        shutil.rmtree(self._own)
