"""The processes of a run meet before JAX starts: who is missing, and do all mean the same run?

Where a process stays away, JAX aborts the others with a stack trace that names nobody, and where
they differ in a key they hang or train nonsense. So each first sends its settings over a plain
socket to process 0, which answers all of them alike and leaves the port to JAX's own coordinator.
One line of JSON each way; this module needs no JAX.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.common.errors import UserError

# Seconds: between two tries to reach process 0, and for one message once connected.
RETRY, MESSAGE = 0.3, 5.0

# Nobody there, or something there that does not speak as a process of a run does.
STRANGE = (OSError, ValueError, KeyError, TypeError)


def meet(
    address: str, num_processes: int, process_id: int, settings: Mapping, timeout: float
) -> None:
    """Returns in every process once all are there and agree.

    Args:
      address: host:port where process 0 listens; free again afterwards.
      settings: nested mappings of what must be the same everywhere; anything that JSON can hold.
      timeout: seconds, counted in each process from its own call.

    Raises:
      UserError: in every process that came, naming those that are missing or the first key that
        differs with both values.
    """
    host, _, port = address.rpartition(":")
    # Through JSON, so that tuples and lists compare equal.
    flat = json.loads(json.dumps(dict(_flatten({"num_processes": num_processes, **settings}))))
    if process_id == 0:
        problem = _gather(address, int(port), num_processes, flat, timeout)
    else:
        hello = {"process_id": process_id, "settings": flat}
        problem = _report((host.strip("[]"), int(port)), hello, timeout)
    if problem:
        raise UserError(problem)


def _gather(address: str, port: int, num_processes: int, settings: dict, timeout: float) -> str:
    """Process 0: hears the others until all came or time is up, and answers each the same."""
    deadline = time.monotonic() + timeout
    seen = {0: settings}
    with contextlib.ExitStack() as connections:
        try:
            server = connections.enter_context(_listen(port))
        except OSError as e:
            raise UserError(f"process 0 cannot listen at {address}: {e.strerror}") from e
        waiting = []
        while len(seen) < num_processes and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(*STRANGE):
                connection = connections.enter_context(server.accept()[0])
                hello = _receive(connection, MESSAGE)
                seen[hello["process_id"]] = hello["settings"]
                waiting.append(connection)
        problem = _difference(seen) or _missing(seen, num_processes, timeout)
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(_line({"problem": problem}))
        for connection in waiting:
            # The other side closes first: a socket closed here would hold the port for a while.
            with contextlib.suppress(OSError):
                connection.settimeout(MESSAGE)
                connection.recv(1)
    return problem


def _report(address: tuple[str, int], hello: dict, timeout: float) -> str:
    """Every other process: tells process 0 its settings and returns what that answers."""
    deadline = time.monotonic() + timeout
    while True:
        # Refused, reset or not understood: process 0 is not up yet, or is being restarted.
        with (
            contextlib.suppress(*STRANGE),
            socket.create_connection(address, timeout=MESSAGE) as connection,
        ):
            connection.sendall(_line(hello))
            # Process 0 waits `timeout` from its own start, which may be as late as now.
            return _receive(connection, timeout + MESSAGE)["problem"]
        if time.monotonic() > deadline:
            return (
                f"process 0 did not answer at {address[0]}:{address[1]} "
                f"within --join_timeout={timeout:g} seconds"
            )
        time.sleep(RETRY)


def _listen(port: int) -> socket.socket:
    """A server on all interfaces, on IPv6 as well where the machine has it."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _line(message: Mapping) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _receive(connection: socket.socket, timeout: float) -> dict:
    connection.settimeout(timeout)
    with connection.makefile("rb") as lines:
        return json.loads(lines.readline())


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """{"config": {"model": {"dim": 1}}} -> ("config.model.dim", 1)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _difference(seen: dict[int, dict]) -> str:
    """One line on the first key in which a process differs from process 0, or ""."""
    for process_id, settings in sorted(seen.items()):
        for key in [*seen[0], *settings]:
            ours, theirs = seen[0].get(key), settings.get(key)
            if ours != theirs:
                return (
                    f"the hosts differ: {key} is {ours!r} on process 0 and {theirs!r} "
                    f"on process {process_id}; start all with the same command and code"
                )
    return ""


def _missing(seen: dict[int, dict], num_processes: int, timeout: float) -> str:
    """One line that lists who did not come, or ""."""
    missing = [i for i in range(num_processes) if i not in seen]
    if not missing:
        return ""
    names = ", ".join(str(i) for i in missing[:20]) + (", ..." if len(missing) > 20 else "")
    return (
        f"{len(missing)} of {num_processes} processes did not join within "
        f"--join_timeout={timeout:g} seconds; missing: process {names}"
    )
