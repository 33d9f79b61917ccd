"""Start-up of many processes, and the wish to stop that a preemption or Ctrl-C sends."""

from __future__ import annotations

import signal

import jax
from jax.experimental import multihost_utils

from imagen_jax.errors import UserError


def start(coordinator: str, num_processes: int, process_id: int, auto: bool) -> None:
    """Joins the processes of a run; must come before anything touches a device.

    Args:
      coordinator: host:port of process 0, with num_processes and process_id; "" for none.
      auto: let JAX find them out, as it can on Cloud TPU VMs, GKE and SLURM.
    """
    if coordinator:
        if not 0 <= process_id < num_processes:
            raise UserError(f"--process_id is {process_id}; allowed: 0 to {num_processes - 1}")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif auto:
        jax.distributed.initialize()


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into "save and stop after this step", on every host."""

    def __init__(self):
        self._signalled = False
        if jax.process_count() > 1:
            return  # JAX has taken SIGTERM itself, to have all hosts agree on the step
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number, frame):
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True

    def __call__(self, step: int) -> bool:
        """Whether to stop at `step`; every process gets the same answer."""
        if jax.process_count() == 1:
            return self._signalled
        return bool(multihost_utils.reached_preemption_sync_point(step))
