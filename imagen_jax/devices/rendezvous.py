"""Checks, before JAX starts, that all processes of a run are present with equal settings.

If a process is missing, JAX aborts the others with a stack trace that does not name it. If settings
differ, the processes hang or train something meaningless. So each process first sends its settings
to process 0 over a plain socket, one line of JSON. Process 0 sends the same answer to all, then
frees the port for JAX's coordinator. The connections stay open for devices.lifeline. This module
does not import JAX.

Anything may connect to an open port: a scanner, a web browser, a process of another run. Messages
of another form are dropped, and none delays the others. This does not stop an attacker, who could
also speak to JAX's coordinator: keep the port inside the cluster's network.
"""

from __future__ import annotations

import contextlib
import json
import selectors
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from imagen_jax.common.errors import UserError

# Seconds between attempts to reach process 0, and seconds that one message may take.
RETRY, MESSAGE = 0.3, 5.0
# Longest message in bytes; settings take about 10,000. Most clients that are being read at once.
LONGEST, MOST_CLIENTS = 2**20, 512
PROTOCOL = "imagen_jax rendezvous 1"

# No connection, or a peer that does not follow the protocol.
BAD_PEER = (OSError, ValueError, RecursionError)


def meet(
    address: str, num_processes: int, process_id: int, settings: Mapping, timeout: float
) -> dict[int, socket.socket]:
    """Returns in every process once all have called it with equal settings.

    Args:
      address: host:port where process 0 listens. The port is free again on return.
      settings: nested mappings that must be equal in all processes; values must fit in JSON.
      timeout: seconds to wait, counted in each process from its own call.

    Returns:
      Open connections by the number of the process at the other end: in process 0 one to each of
      the others, in each of the others one to process 0.

    Raises:
      UserError: processes are missing or settings differ. Every process that called raises it,
        naming the missing processes, or the first key that differs with both values.
    """
    host, _, port = address.rpartition(":")
    # JSON turns tuples into lists, so that both compare equal.
    flat = json.loads(json.dumps(dict(_flatten({"num_processes": num_processes, **settings}))))
    if process_id == 0:
        return _gather(address, int(port), num_processes, flat, timeout)
    hello = {"process_id": process_id, "settings": flat}
    return {0: _report((host.strip("[]"), int(port)), hello, timeout)}


def _gather(
    address: str, port: int, num_processes: int, settings: dict, timeout: float
) -> dict[int, socket.socket]:
    """Collects the other processes' settings in process 0, and sends all of them one answer."""
    deadline = time.monotonic() + timeout
    seen = {0: settings}
    peers: dict[int, socket.socket] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(_listen(port))
        except OSError as e:
            raise UserError(f"process 0 cannot listen at {address}: {e.strerror}") from e
        hellos = stack.enter_context(contextlib.closing(_hellos(server, deadline)))
        while len(seen) < num_processes and (found := next(hellos, None)):
            connection, line = found
            stack.enter_context(connection)
            with contextlib.suppress(*BAD_PEER):
                process_id, theirs = _checked_hello(line)
                seen[process_id], peers[process_id] = theirs, connection
        problem = _difference(seen) or _missing(seen, num_processes, timeout)
        for connection in peers.values():
            with contextlib.suppress(OSError):
                connection.settimeout(MESSAGE)
                send(connection, {"problem": problem})
        if not problem:
            # Only those of `peers` outlive the block.
            return {process_id: connection.dup() for process_id, connection in peers.items()}
        for connection in peers.values():
            # Let the peer close first: the side that closes first blocks the port for a while.
            with contextlib.suppress(OSError):
                connection.recv(1)
    raise UserError(problem)


def _hellos(server: socket.socket, deadline: float) -> Iterator[tuple[socket.socket, bytes]]:
    """Yields each client that has sent a line, and the line, until the deadline.

    Reads all clients at once and closes those that are slow, send too much or are too many.
    """
    clients: dict[socket.socket, tuple[float, bytearray]] = {}
    with selectors.DefaultSelector() as selector:

        def drop(client: socket.socket, close: bool = True) -> bytearray:
            selector.unregister(client)
            if close:
                client.close()
            return clients.pop(client)[1]

        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)
        try:
            while (left := deadline - time.monotonic()) > 0:
                for key, _ in selector.select(min(left, RETRY)):
                    client = key.fileobj
                    if client is server:
                        try:
                            client, _ = server.accept()
                        except OSError:  # it has gone again
                            continue
                        client.setblocking(False)
                        clients[client] = time.monotonic() + MESSAGE, bytearray()
                        selector.register(client, selectors.EVENT_READ)
                        continue
                    if client not in clients:
                        continue
                    _, line = clients[client]
                    try:
                        data = client.recv(2**16)
                    except OSError:
                        data = b""
                    line += data
                    if b"\n" in data:
                        yield client, bytes(drop(client, close=False))
                    elif not data or len(line) > LONGEST:
                        drop(client)
                now = time.monotonic()
                for client in [c for c, (until, _) in clients.items() if until < now]:
                    drop(client)
                while len(clients) > MOST_CLIENTS:
                    drop(next(iter(clients)))
        finally:
            for client in list(clients):
                drop(client)


def _checked_hello(line: bytes) -> tuple[int, dict[str, Any]]:
    """Returns the number and the settings of a process. Raises ValueError for anything else."""
    hello = _message(line)
    process_id, settings = hello.get("process_id"), hello.get("settings")
    # Whether the number is below num_processes, which may differ, is for `_difference` to say.
    if type(process_id) is not int or not 0 < process_id < 2**31 or not isinstance(settings, dict):
        raise ValueError("not a process of a run")
    return process_id, settings


def _message(line: bytes) -> dict[str, Any]:
    message = json.loads(line) if len(line) <= LONGEST else None
    if not isinstance(message, dict) or message.get("protocol") != PROTOCOL:
        raise ValueError("not a message of this protocol")
    return message


def _report(address: tuple[str, int], hello: dict, timeout: float) -> socket.socket:
    """Sends the settings of another process to process 0; returns the connection."""
    deadline = time.monotonic() + timeout
    while True:
        # Refused, reset or a bad answer: process 0 is not up yet or is restarting.
        with (
            contextlib.suppress(*BAD_PEER),
            socket.create_connection(address, timeout=MESSAGE) as connection,
        ):
            send(connection, hello)
            # Process 0 may have started its own `timeout` just now.
            problem = receive(connection, timeout + MESSAGE).get("problem")
            if problem == "":
                return connection.dup()
            if isinstance(problem, str):
                break
        if time.monotonic() > deadline:
            problem = (
                f"process 0 did not answer at {address[0]}:{address[1]} "
                f"within --join_timeout={timeout:g} seconds"
            )
            break
        time.sleep(RETRY)
    raise UserError(problem)


def _listen(port: int) -> socket.socket:
    """Listens on all interfaces, with IPv6 if the machine has it."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """Sends a message as one line. Raises OSError."""
    connection.sendall(json.dumps({"protocol": PROTOCOL, **message}).encode() + b"\n")


def receive(connection: socket.socket, timeout: float) -> dict[str, Any]:
    """Receives a message. Raises an exception of BAD_PEER if none comes or it is something else."""
    connection.settimeout(timeout)
    with connection.makefile("rb") as lines:
        return _message(lines.readline(LONGEST + 1))


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
                name = key if key in seen[0] else repr(key)
                return (
                    f"the processes differ: {name:.200} is {ours!r:.200} on process 0 and "
                    f"{theirs!r:.200} on process {process_id}; start all with the same command and "
                    "code"
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
