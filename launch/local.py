"""Runs N training processes on this machine, to try a run on many hosts without renting any.

    python -m launch.local --num_processes=2 -- --config=configs/base64.py:tiny --workdir=runs/two

Words after `--` are flags of imagen_jax.train. Each line of output starts with the number of its
process. Ctrl-C or SIGTERM makes all processes save and stop at the same step; a second Ctrl-C kills
them. If a process fails, the others are stopped. The exit code is the first nonzero one, or 0.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from launch import pop_train_args

FLAGS = flags.FLAGS

POLL = 0.1
# Seconds from a failure to killing the other processes. They stop at the end of a step, which they
# may never reach without the failed process.
GRACE = 10.0
# Exit code of imagen_jax.train for "saved and stopped": the other processes are saving too.
STOPPED = 75


def define_flags() -> None:
    """Defines the flags when this runs as a program; importing the module must define none."""
    flags.DEFINE_integer("num_processes", 2, "Number of processes to start.")


def main(train_args: Sequence[str]) -> None:
    """Runs the processes and exits with their exit code."""
    if FLAGS.num_processes < 1:
        raise UserError(f"--num_processes is {FLAGS.num_processes}; allowed: 1 or more")
    if not train_args:
        raise UserError("nothing to start; give the flags of imagen_jax.train after --")
    sys.exit(run(FLAGS.num_processes, train_args))


def run(num_processes: int, train_args: Sequence[str]) -> int:
    """Runs the processes until all end; returns the first nonzero exit code, or 0."""
    processes = start(num_processes, train_args)
    printers = [threading.Thread(target=print_lines, args=(i, p)) for i, p in enumerate(processes)]
    for printer in printers:
        printer.start()

    def stop(number, frame):
        # A second SIGTERM repeats the request to stop; only a second Ctrl-C kills.
        again, stop.asked = stop.asked, True
        send(processes, signal.SIGKILL if again and number == signal.SIGINT else signal.SIGTERM)

    stop.asked = False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    code = wait(processes)
    for printer in printers:
        printer.join()
    return code


def start(num_processes: int, train_args: Sequence[str]) -> list[subprocess.Popen]:
    """Starts the processes, each in its own session: Ctrl-C must reach them only through `stop`."""
    command = [sys.executable, "-u", "-m", "imagen_jax.train", *train_args]
    command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={num_processes}"]
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Processes can share the CPU, but not an accelerator.
            env={"JAX_PLATFORMS": "cpu", **os.environ},
        )
        for i in range(num_processes)
    ]


def wait(processes: Sequence[subprocess.Popen]) -> int:
    """Waits for all processes; if one fails, sends the others SIGTERM and, after GRACE, SIGKILL."""
    first, deadline = 0, float("inf")
    while True:
        codes = [p.poll() for p in processes]
        if not first and (first := cause(codes)) not in (0, STOPPED):
            send(processes, signal.SIGTERM)
            deadline = time.monotonic() + GRACE
        if None not in codes:
            return first
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
        time.sleep(POLL)


def cause(codes: Sequence[int | None]) -> int:
    """Returns the exit code that explains the others, 0 if none has failed.

    If a process is killed, the others end with STOPPED in the same moment.
    """
    failed = sorted((code for code in codes if code), key=lambda code: code == STOPPED)
    # Popen reports death by signal N as -N; shells report it as 128 + N.
    return next((code if code > 0 else 128 - code for code in failed), 0)


def send(processes: Sequence[subprocess.Popen], number: int) -> None:
    """Sends a signal to the processes that are still running."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def print_lines(index: int, process: subprocess.Popen) -> None:
    """Prints the output of a process, each line prefixed with the number of the process."""
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    train_args = pop_train_args()
    define_flags()
    cli.run(lambda argv: main(train_args))
