"""Start-up of many processes, and how they stop together."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping

import jax
from jax.experimental import multihost_utils

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.devices import rendezvous

DAY_MS = 24 * 60 * 60 * 1000


@dataclasses.dataclass(frozen=True)
class Job:
    """This process among those of a run.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: processes in all.
      process_id: this one, from 0.
    """

    coordinator: str
    num_processes: int
    process_id: int

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator is {self.coordinator!r}; it must be host:port")
        if self.num_processes < 1:
            raise UserError(f"--num_processes is {self.num_processes}; allowed: 1 or more")
        if not 0 <= self.process_id < self.num_processes:
            allowed = f"0 to {self.num_processes - 1}"
            raise UserError(f"--process_id is {self.process_id}; allowed: {allowed}")


def discover(timeout: int) -> Job:
    """The job that JAX finds by itself: Cloud TPU VMs, GKE and JobSet, SLURM, Open MPI.

    Args:
      timeout: seconds to wait for the name of process 0's host to be known.

    Raises:
      UserError: if this process is in none of them.
    """
    # Private, for want of a public way to learn these three without joining at once.
    from jax._src.clusters import ClusterEnv

    unset = (None,) * 5
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(*unset, timeout)
    except RuntimeError as e:
        raise UserError(f"--distributed: {' '.join(str(e).split())}") from e
    if found[0] is None:
        raise UserError(
            "--distributed found no Cloud TPU VM, GKE, SLURM or MPI job here; give --coordinator, "
            "--num_processes and --process_id instead"
        )
    return Job(*found[:3])


def join(job: Job, settings: Mapping, join_timeout: int, heartbeat_timeout: int) -> None:
    """Joins the processes of a run; must come before anything touches a device.

    Args:
      settings: what must be the same in all of them, see `rendezvous.meet`.
      join_timeout: seconds to wait for the others.
      heartbeat_timeout: seconds after which a silent process is taken for dead and all abort.

    Raises:
      UserError: naming the processes that did not come, or the setting that differs.
    """
    for flag, seconds in (("join", join_timeout), ("heartbeat", heartbeat_timeout)):
        if seconds < 1:
            raise UserError(f"--{flag}_timeout is {seconds}; allowed: 1 second or more")
    rendezvous.meet(job.coordinator, job.num_processes, job.process_id, settings, join_timeout)
    jax.distributed.initialize(
        job.coordinator,
        job.num_processes,
        job.process_id,
        initialization_timeout=join_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )
    if job.process_id:
        cli.log.setLevel(logging.WARNING)  # all would say the same


def wait_for_all(name: str) -> None:
    """Returns once every process has called it with this name, hours later if need be.

    Between devices there would be a limit: on CPUs a collective gives up on a process that comes
    half a minute late.
    """
    if jax.process_count() > 1:
        # Private, for want of a public barrier that needs no devices.
        from jax._src.distributed import global_state

        global_state.client.wait_at_barrier(name, timeout_in_ms=DAY_MS)


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """Among many processes, an error in the block ends this one now, with its message and code.

    At a usual exit JAX waits minutes for the other processes, which wait for this one, and then
    aborts it: the exit code and the last line would be JAX's.
    """
    try:
        yield
    except BaseException as e:
        if jax.process_count() == 1:
            raise
        code = 1
        if isinstance(e, UserError):
            print(f"error: {e}", file=sys.stderr)
            code = cli.BAD_INPUT
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class StopRequest:
    """Turns SIGTERM and the first Ctrl-C into "save and stop after this step", on every host."""

    def __init__(self):
        self._signalled = False
        self._many = jax.process_count() > 1
        signal.signal(signal.SIGINT, self._handle)
        if not self._many:
            signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame):
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True
        if self._many:
            # JAX has taken SIGTERM itself, to have all processes agree on the step.
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        """Whether to stop at `step`; every process gets the same answer."""
        if self._many:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._signalled
