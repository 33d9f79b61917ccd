"""If a process of a run ends early, the others end at once with its exit code and one line."""

import contextlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from imagen_jax.common.errors import STOPPED, WORKDIR_FAILED
from imagen_jax.devices import lifeline
from launch import local

PROGRAM = """
import ctypes, os, sys, time
from imagen_jax.devices import rendezvous
from imagen_jax.devices.lifeline import Lifeline

process, port, action = int(sys.argv[1]), sys.argv[2], sys.argv[3]
connections = rendezvous.meet(f"localhost:{port}", 3, process, {}, 60.0)
line = Lifeline(process, connections, lost_after=50)
if process != 1:
    line.report = lambda end: f"{end}; the same command resumes from step 4"
print("joined", flush=True)
if action:
    input()
if action == "abort":
    ctypes.CDLL(None).abort()  # without the interpreter's lock, as a thread of JAX
if action:
    code, reason = action.split(",")
    line.leave(int(code), reason)
    os._exit(int(code))
time.sleep(60)
"""


@pytest.fixture
def three():
    """Returns a function that starts three processes, each with its action, when all have joined.

    The processes act when they are sent a line.
    """
    with contextlib.ExitStack() as stack:

        def start(*actions):
            port = str(local.free_port())
            running = [
                stack.enter_context(
                    subprocess.Popen(
                        [sys.executable, "-c", PROGRAM, str(i), port, action],
                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        text=True, cwd=ROOT,
                    )
                )
                for i, action in enumerate(actions)
            ]  # fmt: skip
            for process in running:
                stack.callback(process.kill)
            for process in running:
                assert process.stdout.readline() == "joined\n", process.communicate()[1]
            return running

        yield start


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("killed", [0, 2])
def test_the_others_end_at_once_when_one_is_killed(killed, three):
    running = three("", "", "")
    running[killed].kill()
    for i, process in enumerate(running):
        err = process.communicate(timeout=60)[1]
        if i != killed:
            more = (
                "run the same command again" if i == 1 else "the same command resumes from step 4"
            )
            assert err == f"error: process {killed} is gone; {more}\n"
            assert process.returncode == STOPPED


def test_the_others_end_with_the_reason_and_the_code_of_one_that_fails(three):
    running = three("", f"{WORKDIR_FAILED},runs/x: No space left\non device", "")
    go(running[1])
    for process in (running[0], running[2]):
        err = process.communicate(timeout=60)[1]
        assert err.startswith("error: process 1: runs/x: No space left on device;")
        assert err.count("\n") == 1 and process.returncode == WORKDIR_FAILED


def test_one_that_ends_in_order_ends_no_other(three):
    running = three("0,", "0,", "0,")
    for i, process in enumerate(running):
        go(process)
        assert process.wait(timeout=60) == 0
        time.sleep(0.3)
        assert all(p.poll() is None for p in running[i + 1 :])


def test_an_abort_waits_for_the_line_about_another_process(three):
    """JAX aborts in the same moment in which the lifeline learns that process 0 is gone."""
    running = three("", "", "abort")
    go(running[2])
    time.sleep(0.5)
    running[0].kill()
    err = running[2].communicate(timeout=60)[1]
    assert err.endswith("error: process 0 is gone; the same command resumes from step 4\n")
    assert running[2].returncode == STOPPED


def test_an_abort_for_another_reason_still_ends_the_process(three):
    running = three("", "abort", "")
    go(running[1])
    assert running[1].wait(timeout=60) == -signal.SIGABRT
    assert "error: process 1 is gone" in running[2].communicate(timeout=60)[1]


def test_the_system_tests_a_connection_whose_host_may_be_lost():
    with socket.socket() as connection:
        lifeline._keep_alive(connection, lost_after=50)
        options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        found = [connection.getsockopt(socket.IPPROTO_TCP, option) for option in options]
        assert found == [10, 10, 4]
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
