"""Joins the processes of a run and stops them together."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from imagen_jax.common import cli
from imagen_jax.common.errors import STOPPED, RunError, UserError, first_line
from imagen_jax.devices import rendezvous
from imagen_jax.devices.lifeline import End, Lifeline

DAY_MS = 24 * 60 * 60 * 1000
# Seconds that an error waits for news of another process, which may have caused it.
NEWS_S = 3.0

_lifeline: Lifeline | None = None


@dataclasses.dataclass(frozen=True)
class Job:
    """This process and the run it belongs to.

    Attributes:
      coordinator: host:port of process 0.
      num_processes: number of processes in the run.
      process_id: number of this process, from 0.

    Raises:
      UserError: a value is out of range.
    """

    coordinator: str
    num_processes: int
    process_id: int

    def __post_init__(self):
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator is {self.coordinator!r}; allowed: host:port")
        if self.num_processes < 1:
            raise UserError(f"--num_processes is {self.num_processes}; allowed: 1 or more")
        if not 0 <= self.process_id < self.num_processes:
            allowed = f"0 to {self.num_processes - 1}"
            raise UserError(f"--process_id is {self.process_id}; allowed: {allowed}")


def discover(timeout: int) -> Job:
    """Finds the job through JAX: on Cloud TPU VMs, GKE with or without JobSet, SLURM, Open MPI.

    Args:
      timeout: seconds to wait until the name of process 0's host is known.

    Raises:
      UserError: this process is not part of such a job.
    """
    # Private: JAX has no public way to find the job without joining it.
    from jax._src.clusters import ClusterEnv

    unset = (None,) * 5
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(*unset, timeout)
    except RuntimeError as e:
        raise UserError(f"--distributed: {' '.join(str(e).split())}") from e
    if found[0] is None:
        raise UserError(
            "--distributed found no Cloud TPU VM, GKE, SLURM or MPI job; use --coordinator, "
            "--num_processes and --process_id instead"
        )
    return Job(*found[:3])


def join(job: Job, settings: Mapping, join_timeout: int, heartbeat_timeout: int) -> None:
    """Joins the processes of a run. Call this before anything uses a device.

    Args:
      settings: settings that must be equal in all processes, see `rendezvous.meet`.
      join_timeout: seconds to wait for the other processes.
      heartbeat_timeout: seconds of silence after which a process counts as dead and all end.

    Raises:
      UserError: a process is missing or a setting differs; the message names it.
    """
    for flag, seconds in (("join", join_timeout), ("heartbeat", heartbeat_timeout)):
        if seconds < 1:
            raise UserError(f"--{flag}_timeout is {seconds}; allowed: 1 second or more")
    global _lifeline
    place = (job.coordinator, job.num_processes, job.process_id)
    connections = rendezvous.meet(*place, settings, join_timeout)
    if job.num_processes > 1:
        # JAX aborts a little later than this.
        _lifeline = Lifeline(job.process_id, connections, lost_after=heartbeat_timeout / 2)
    jax.distributed.initialize(
        *place,
        initialization_timeout=join_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
    )
    if job.process_id:
        cli.log.setLevel(logging.WARNING)  # process 0 logs the same lines


def wait_for_all(name: str) -> None:
    """Waits up to a day until every process has called this with the same name.

    A collective on the devices has a shorter limit: on CPUs it fails if a process is 30 seconds
    late.
    """
    if jax.process_count() > 1:
        # Private: JAX has no public barrier that works without devices.
        from jax._src.distributed import global_state

        global_state.client.wait_at_barrier(name, timeout_in_ms=DAY_MS)


def from_first(numbers: Sequence[int], most: int = 64) -> list[int]:
    """Returns process 0's whole numbers in every process, at most the first `most`."""
    if jax.process_count() == 1:
        return list(numbers)
    padded = np.full(most, -1, np.int32)
    padded[: len(numbers)] = numbers[:most]
    found = multihost_utils.broadcast_one_to_all(padded)
    return [int(number) for number in found if number >= 0]


def first_text(text: str, most: int = 512) -> str:
    """Returns the text of the first process that has one, in every process; "" if none has."""
    if jax.process_count() == 1:
        return text
    wait_for_all(f"text {next(_texts)}")  # a collective alone would limit the wait
    padded = np.frombuffer(text.encode()[:most].ljust(most, b"\0"), np.uint8)
    rows = multihost_utils.process_allgather(padded)
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in np.asarray(rows))
    return next(filter(None, texts), "")


_texts = itertools.count()


@contextlib.contextmanager
def reporting_ends(report: Callable[[End], str]) -> Iterator[None]:
    """In the block, `report` writes the last line of this process if another one ends early."""
    if not _lifeline:
        yield
        return
    before, _lifeline.report = _lifeline.report, report
    yield
    # Not after an error, which may come from the end of another process.
    _lifeline.report = before


@contextlib.contextmanager
def failing_at_once() -> Iterator[None]:
    """Ends all processes at once on an error in the block, with its message and exit code.

    With a single process, the error propagates as usual.

    With several, a normal exit would make JAX wait minutes for the other processes, which wait for
    this one. JAX would then abort this process with its own exit code and last line.
    """
    try:
        yield
    except BaseException as e:
        if not _lifeline:
            raise
        code, reason = 1, f"{type(e).__name__}: {first_line(e)}"
        if isinstance(e, (UserError, RunError)):
            code, reason = e.code, str(e)
            print(f"error: {e}", file=sys.stderr)
        elif isinstance(e, KeyboardInterrupt):
            code, reason = 130, "interrupted"
            print(reason, file=sys.stderr)
        else:
            # If a process dies, collectives fail in the others. The lifeline then ends this one.
            time.sleep(NEWS_S)
            traceback.print_exception(e)
        _lifeline.leave(code, reason)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if _lifeline:
        _lifeline.leave(0)


@contextlib.contextmanager
def stopping_at_once() -> Iterator[None]:
    """Makes SIGTERM end this process at once in the block, before there is anything to save.

    With several processes, JAX handles SIGTERM, but acts on it only between steps. Its handler is
    not one of Python's, so only the C library can put it aside and back.
    """
    native = ctypes.CDLL(None).signal
    native.argtypes, native.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = native(signal.SIGTERM, None)
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        with _ending_from_a_thread():
            yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        native(signal.SIGTERM, before)


@contextlib.contextmanager
def _ending_from_a_thread() -> Iterator[None]:
    """Ends this process on SIGTERM.

    In a thread, because Python runs no handler while the main thread is in a library, such as XLA
    that compiles for minutes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def watch():
        while number := os.read(reader, 1)[0]:
            if number == signal.SIGTERM:
                os.write(2, b"stopped before training began; the same command starts again\n")
                os._exit(STOPPED)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    previous = signal.set_wakeup_fd(writer)  # Python writes the number of each signal to it
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.write(writer, b"\0")
        thread.join()
        os.close(reader)
        os.close(writer)


class StopRequest:
    """Request to save and stop: SIGTERM or the first Ctrl-C in any process stops all of them.

    SIGTERM before the first step ends this process at once, because there is nothing to save. From
    then on, with several processes, JAX handles it: it makes all agree on the step to stop at.
    """

    def __init__(self):
        self._signalled = self._training = False
        self._many = jax.process_count() > 1
        self._before = contextlib.ExitStack()
        self._before.enter_context(stopping_at_once())
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number, frame):
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not self._signalled:
            # Not through the log, which this signal may have interrupted.
            again = b"; a second Ctrl-C ends at once" if number == signal.SIGINT else b""
            os.write(2, b"stopping after the current steps, then saving" + again + b"\n")
        self._signalled = True
        if self._many and self._training:
            os.kill(os.getpid(), signal.SIGTERM)

    def _begin(self):
        self._training = True
        self._before.close()
        if not self._many:
            signal.signal(signal.SIGTERM, self._handle)
        elif self._signalled:
            os.kill(os.getpid(), signal.SIGTERM)

    def __call__(self, step: int) -> bool:
        """Returns whether to stop after `step`, the same in every process."""
        if not self._training:
            self._begin()
        if self._many:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._signalled
