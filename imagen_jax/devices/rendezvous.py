"""Checks, before JAX starts, that all processes of a run are present with equal settings.

If a process is missing, JAX aborts the others with a stack trace that does not name it. If settings
differ, the processes hang or train something meaningless. So each process first sends its settings
to process 0 over a plain socket, one line of JSON. Process 0 sends the same answer to all, then
frees the port for JAX's coordinator. This module does not import JAX.
"""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterable, Mapping
from typing import Any

from imagen_jax.common.errors import UserError

# Seconds between attempts to reach process 0, and seconds that one message may take.
RETRY, MESSAGE = 0.3, 5.0

# No connection, or a peer that does not follow the protocol.
BAD_PEER = (OSError, ValueError, KeyError, TypeError)


def meet(
    address: str, num_processes: int, process_id: int, settings: Mapping, timeout: float
) -> None:
    """Returns in every process once all have called it with equal settings.

    Args:
      address: host:port where process 0 listens. The port is free again on return.
      settings: nested mappings that must be equal in all processes; values must fit in JSON.
      timeout: seconds to wait, counted in each process from its own call.

    Raises:
      UserError: processes are missing or settings differ. Every process that called raises it,
        naming the missing processes, or the first key that differs with both values.
    """
    host, _, port = address.rpartition(":")
    # JSON turns tuples into lists, so that both compare equal.
    flat = json.loads(json.dumps(dict(_flatten({"num_processes": num_processes, **settings}))))
    if process_id == 0:
        problem = _gather(address, int(port), num_processes, flat, timeout)
    else:
        hello = {"process_id": process_id, "settings": flat}
        problem = _report((host.strip("[]"), int(port)), hello, timeout)
    if problem:
        raise UserError(problem)


def _gather(address: str, port: int, num_processes: int, settings: dict, timeout: float) -> str:
    """Collects the other processes' settings in process 0, and sends all of them one answer."""
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
            with contextlib.suppress(*BAD_PEER):
                connection = connections.enter_context(server.accept()[0])
                hello = _receive(connection, MESSAGE)
                seen[hello["process_id"]] = hello["settings"]
                waiting.append(connection)
        problem = _difference(seen) or _missing(seen, num_processes, timeout)
        for connection in waiting:
            with contextlib.suppress(OSError):
                connection.sendall(_line({"problem": problem}))
        for connection in waiting:
            # Let the peer close first: the side that closes first blocks the port for a while.
            with contextlib.suppress(OSError):
                connection.settimeout(MESSAGE)
                connection.recv(1)
    return problem


def _report(address: tuple[str, int], hello: dict, timeout: float) -> str:
    """Sends the settings of another process to process 0 and returns the answer."""
    deadline = time.monotonic() + timeout
    while True:
        # Refused, reset or a bad answer: process 0 is not up yet or is restarting.
        with (
            contextlib.suppress(*BAD_PEER),
            socket.create_connection(address, timeout=MESSAGE) as connection,
        ):
            connection.sendall(_line(hello))
            # Process 0 may have started its own `timeout` just now.
            return _receive(connection, timeout + MESSAGE)["problem"]
        if time.monotonic() > deadline:
            return (
                f"process 0 did not answer at {address[0]}:{address[1]} "
                f"within --join_timeout={timeout:g} seconds"
            )
        time.sleep(RETRY)


def _listen(port: int) -> socket.socket:
    """Listens on all interfaces, with IPv6 if the machine has it."""
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
    """Flattens nested mappings: {"config": {"dim": 1}} yields ("config.dim", 1)."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _difference(seen: dict[int, dict]) -> str:
    """Returns one line on the first key that differs from process 0, or ""."""
    for process_id, settings in sorted(seen.items()):
        for key in [*seen[0], *settings]:
            ours, theirs = seen[0].get(key), settings.get(key)
            if ours != theirs:
                return (
                    f"the processes differ: {key} is {ours!r} on process 0 and {theirs!r} "
                    f"on process {process_id}; start all with the same command and code"
                )
    return ""


def _missing(seen: dict[int, dict], num_processes: int, timeout: float) -> str:
    """Returns one line that lists the missing processes, or ""."""
    missing = [i for i in range(num_processes) if i not in seen]
    if not missing:
        return ""
    names = ", ".join(str(i) for i in missing[:20]) + (", ..." if len(missing) > 20 else "")
    return (
        f"{len(missing)} of {num_processes} processes did not join within "
        f"--join_timeout={timeout:g} seconds; missing: process {names}"
    )
