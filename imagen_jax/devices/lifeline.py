"""Ends every process of a run at once, with the same line and exit code, if one of them ends early.

JAX alone notices a dead process after --heartbeat_timeout and then aborts the others with a stack
trace. Here each process keeps the connection to process 0 over which it joined. The system closes
the connections of a process that dies, so process 0 knows at once, and passes it on.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import threading
from collections.abc import Callable, Mapping
from typing import NamedTuple

from imagen_jax.common.errors import STOPPED
from imagen_jax.devices import rendezvous

# Longest reason, in characters; a message must not fill a socket's buffer.
LONGEST = 1000


class End(NamedTuple):
    """How a process ended.

    Attributes:
      process: its number.
      code: its exit code; 0 means that it ended in order, so the others go on.
      reason: one line; "" if it was killed or its host is lost.
    """

    process: int
    code: int = STOPPED
    reason: str = ""

    def __str__(self) -> str:
        return f"process {self.process}" + (f": {self.reason}" if self.reason else " is gone")


class Lifeline:
    """Watches the other processes from a thread.

    Attributes:
      report: called in that thread before it ends this process, with how the other one ended; it
        returns the line to print.
    """

    def __init__(
        self, process_id: int, connections: Mapping[int, socket.socket], lost_after: float
    ):
        """Starts to watch.

        Args:
          connections: those of `rendezvous.meet`.
          lost_after: seconds after which a host that does not answer counts as lost.
        """
        self.report: Callable[[End], str] = _advise
        self._process_id, self._connections = process_id, connections
        for connection in connections.values():
            connection.settimeout(rendezvous.MESSAGE)
            _keep_alive(connection, lost_after)
        _delay_aborts()
        threading.Thread(target=self._watch, name="lifeline", daemon=True).start()

    def leave(self, code: int, reason: str = "") -> None:
        """Tells the other processes how this one ends, before it does."""
        self._send(End(self._process_id, code, " ".join(reason.split())[:LONGEST]))

    def _send(self, end: End) -> None:
        for process, connection in self._connections.items():
            if process != end.process:
                with contextlib.suppress(OSError):
                    rendezvous.send(connection, end._asdict())

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for process, connection in self._connections.items():
                selector.register(connection, selectors.EVENT_READ, process)
            while selector.get_map():
                for key, _ in selector.select():
                    end = _read_end(key.fileobj, key.data)
                    if end.code:
                        self._end(end)
                    selector.unregister(key.fileobj)

    def _end(self, end: End) -> None:
        if self._process_id == 0:
            self._send(end)
        try:
            line = self.report(end)
        except Exception as e:
            line = f"{end} ({type(e).__name__}: {e})"
        os.write(2, f"error: {' '.join(line.split())}\n".encode())
        os._exit(end.code)


def _advise(end: End) -> str:
    return str(end) if end.reason else f"{end}; run the same command again"


def _read_end(connection: socket.socket, process: int) -> End:
    """Reads how a process ended; a connection that closes without a message means it was killed."""
    try:
        found = rendezvous.receive(connection, rendezvous.MESSAGE)
        return End(int(found["process"]), int(found["code"]), str(found["reason"])[:LONGEST])
    except (*rendezvous.BAD_PEER, KeyError, TypeError):
        return End(process)


def _keep_alive(connection: socket.socket, lost_after: float) -> None:
    """Makes the system test the connection: a host that loses power does not close it."""
    probes = 4
    pause = max(1, int(lost_after / (probes + 1)))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in {"IDLE": pause, "INTVL": pause, "CNT": probes}.items():
        if hasattr(socket, f"TCP_KEEP{name}"):  # macOS lacks some
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_KEEP{name}"), value)


def _delay_aborts() -> None:
    """Delays an abort by 6 seconds, so that the lifeline can end this process first.

    JAX aborts from C++ as soon as process 0 is gone. Python cannot catch that, and a handler in
    Python could wait forever for the interpreter's lock. sleep() is safe in a handler of signals;
    the seconds are its argument, the number of the signal.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    library.signal.restype = ctypes.c_void_p
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
