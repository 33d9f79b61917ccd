"""The lock of a workdir in a bucket: an object that its owner writes again and again.

A bucket has no locks that end with a process, so the owner proves that it lives: it writes the
object every BEAT_S seconds. A second run that finds the object waits for SILENT_S. If the object
changes, the run is refused; if not, the owner is dead and the run takes its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from imagen_jax.common import buckets
from imagen_jax.common.cli import log
from imagen_jax.common.errors import WORKDIR_FAILED, UserError

BEAT_S = 20.0
SILENT_S = 90.0  # more than a retried write takes
POLL_S = 5.0
SETTLE_S = 2.0  # time for another run, which took the place at the same moment, to show itself


@contextlib.contextmanager
def owned(path: Path, lost: Callable[[], None] | None = None) -> Iterator[None]:
    """Owns the workdir of which `path` is the lock, and deletes the lock at the end.

    Args:
      lost: called if another run has taken the place while this one was silent for SILENT_S, as a
        suspended machine is. The default ends the process at once, before it can write into the
        other's workdir.

    Raises:
      UserError: another run trains in this workdir.
    """
    me = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "token": uuid.uuid4().hex}
    _take(path, me)
    stop = threading.Event()
    beats = threading.Thread(target=_beat, args=(path, me, stop, lost or _end), daemon=True)
    beats.start()
    try:
        yield
    finally:
        stop.set()
        beats.join()
        with contextlib.suppress(Exception):  # a lock that is left only costs SILENT_S
            if _read(path).get("token") == me["token"]:
                path.unlink()


def _take(path: Path, me: dict[str, str]) -> None:
    with buckets.as_os_errors(path):
        with contextlib.suppress(FileExistsError):
            buckets.create(path, _text(me))
            return
        _wait_for_silence(path)
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        with contextlib.suppress(FileExistsError):
            buckets.create(path, _text(me))
        time.sleep(SETTLE_S)
        if (found := _read(path)).get("token") != me["token"]:
            raise _in_use(path, found)


def _wait_for_silence(path: Path) -> None:
    """Raises UserError if the lock changes within SILENT_S."""
    before = _read(path)
    log.info(
        "%s is held by %s; waiting %.0f s to see whether it still runs",
        path, before.get("holder"), SILENT_S,
    )  # fmt: skip
    end = time.monotonic() + SILENT_S
    while before and time.monotonic() < end:
        time.sleep(POLL_S)
        if (now := _read(path)) and now != before:
            raise _in_use(path, now)
        before = now


def _beat(path: Path, me: dict[str, str], stop: threading.Event, lost: Callable) -> None:
    number = 0
    while not stop.wait(BEAT_S):
        with contextlib.suppress(Exception):  # the next beat may succeed
            if _read(path).get("token") not in (me["token"], None):
                lost()
                return
            number += 1
            path.write_bytes(_text({**me, "beat": str(number)}))


def _end() -> None:
    log.error("error: another run has taken this workdir while this one did not write to it")
    os._exit(WORKDIR_FAILED)


def _text(content: dict[str, str]) -> bytes:
    return json.dumps(content).encode()


def _read(path: Path) -> dict[str, str]:
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _in_use(path: Path, found: dict[str, str]) -> UserError:
    holder = found.get("holder", "another process")
    return UserError(
        f"--workdir={path.parent} is in use by {holder}; stop it, or choose another workdir"
    )
