"""Addresses that the project's pages are served at."""

from __future__ import annotations

import errno
import ipaddress
import socket

from imagen_jax.common.errors import UserError


def listen(host: str, port: int) -> socket.socket:
    """Binds the address of a page; port 0 takes a free one.

    Raises:
      UserError: the address is in use, or is none of this machine's.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as e:
        raise UserError(f"--host is {host!r}; it cannot be resolved ({e.strerror})") from e
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen()
    except OSError as e:
        bound.close()
        if e.errno != errno.EADDRINUSE:
            raise UserError(f"--host={host} --port={port} cannot be used: {e.strerror}") from e
        free = port + 1 if port < 65535 else 7860
        raise UserError(f"--port is {port}, which is in use; try --port={free}") from e
    return bound


def url(host: str, bound: socket.socket) -> str:
    """Returns the URL of a bound address, such as http://127.0.0.1:7860."""
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{bound.getsockname()[1]}"


def allowed_hosts(host: str) -> list[str]:
    """Returns the names that requests may ask for: those of this machine on a loopback address.

    A foreign page then cannot reach the server by a name of its own (DNS rebinding).
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return ["localhost", "127.0.0.1", "::1", "[::1]", host] if loopback else ["*"]
