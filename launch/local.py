"""Starts N training processes on this machine, to try a run of many hosts without renting any.

    python -m launch.local --num_processes=2 -- --config=configs/base64.py:tiny --workdir=runs/two

What follows `--` goes to imagen_jax.train. Each line of output begins with the number of its
process. Ctrl-C or SIGTERM lets all save and stop at the same step; a second Ctrl-C ends them at
once. The exit code is the first that is not 0; where a process fails, the others are stopped.
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

FLAGS = flags.FLAGS

POLL = 0.1
# Seconds that the others get to end by themselves once a process has failed: without their fellow
# they may never reach a step at which to stop.
GRACE = 10.0
# imagen_jax.train: saved and stopped. The others are saving too.
STOPPED = 75


def define_flags() -> None:
    """Defined only by the program that runs, so that modules can be imported side by side."""
    flags.DEFINE_integer("num_processes", 2, "How many processes to start.")


def main(train_args: Sequence[str]) -> None:
    """Starts the processes and waits for them."""
    if FLAGS.num_processes < 1:
        raise UserError(f"--num_processes is {FLAGS.num_processes}; allowed: 1 or more")
    if not train_args:
        raise UserError("nothing to start; give the arguments of imagen_jax.train after `--`")
    sys.exit(run(FLAGS.num_processes, train_args))


def run(num_processes: int, train_args: Sequence[str]) -> int:
    """Runs the processes to their end; returns the first exit code that is not 0, or 0."""
    processes = start(num_processes, train_args)
    printers = [threading.Thread(target=print_lines, args=(i, p)) for i, p in enumerate(processes)]
    for printer in printers:
        printer.start()

    def stop(number, frame):
        # SIGTERM a second time would be the same request again.
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
    """The processes, each in a session of its own so that Ctrl-C reaches them only through us."""
    command = [sys.executable, "-u", "-m", "imagen_jax.train", *train_args]
    command += [f"--coordinator=localhost:{free_port()}", f"--num_processes={num_processes}"]
    return [
        subprocess.Popen(
            [*command, f"--process_id={i}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # One accelerator cannot be shared by several processes; the CPU can.
            env={"JAX_PLATFORMS": "cpu", **os.environ},
        )
        for i in range(num_processes)
    ]


def wait(processes: Sequence[subprocess.Popen]) -> int:
    """Waits for all; a failure stops the others, by SIGKILL if they do not heed SIGTERM."""
    first, deadline = 0, float("inf")
    while any(p.poll() is None for p in processes):
        failed = [p.returncode for p in processes if p.returncode not in (None, 0)]
        if failed and not first:
            # A negative code is the signal that ended the process; shells add it to 128.
            first = failed[0] if failed[0] > 0 else 128 - failed[0]
            if first != STOPPED:
                send(processes, signal.SIGTERM)
                deadline = time.monotonic() + GRACE
        if time.monotonic() > deadline:
            send(processes, signal.SIGKILL)
        time.sleep(POLL)
    return first or next((abs(p.returncode) for p in processes if p.returncode), 0)


def send(processes: Sequence[subprocess.Popen], number: int) -> None:
    """Sends a signal to those that still run."""
    for process in processes:
        if process.poll() is None:
            process.send_signal(number)


def print_lines(index: int, process: subprocess.Popen) -> None:
    """Prints what a process says, line by line, with its number in front."""
    for line in process.stdout:
        print(f"[{index}] {line}", end="", flush=True)


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


if __name__ == "__main__":
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    train_args = sys.argv[cut + 1 :]
    del sys.argv[cut:]
    define_flags()
    cli.run(lambda argv: main(train_args))
