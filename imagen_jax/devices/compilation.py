"""How programs are compiled, kept on disk from one run to the next, and what became of one."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from imagen_jax.common.files import probe_folder

log = logging.getLogger("imagen_jax")

DEFAULT = "~/.cache/imagen_jax/xla"
# Set by JAX for each program that it reads instead of compiling, with the seconds that took.
READ = "/jax/compilation_cache/cache_retrieval_time_sec"
# By platform, of the training step. A TPU else stands still while weights are gathered.
OPTIONS = {"tpu": {"xla_enable_async_all_gather": True}}
UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(\w+)'")


def use_cache(folder: str | None) -> None:
    """Has JAX keep in a folder what took a second or more to compile, and find it there.

    A folder that cannot be written is told in the log, and the run goes on without.

    Args:
      folder: None is JAX_COMPILATION_CACHE_DIR of the environment or else DEFAULT; "" is no cache.
    """
    if folder is None:
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT)
    if folder:
        # XLA splits a CPU's loops over the cores that it sees, but leaves their number out of the
        # key: a program made on one core would be found, and be slow, on all of them.
        folder = os.path.join(os.path.expanduser(folder), f"cores_{_cores()}")
    if folder and "://" not in folder:
        folder = os.path.abspath(folder)
        if _writable(folder):
            _replace_unreadable(folder)
        else:
            folder = ""
    jax.config.update("jax_compilation_cache_dir", folder or None)


def _cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _writable(folder: str) -> bool:
    """Makes the folder if it is not there; says why if it cannot be written."""
    try:
        probe_folder(Path(folder))
    except OSError as e:
        log.warning("no compilation cache: %s cannot be written (%s)", folder, e.strerror)
        return False
    return True


def _replace_unreadable(folder: str) -> None:
    """Drops entries that JAX warns of: a process killed while writing leaves half of one.

    JAX compiles such a program anew, but never writes over what is there.
    """
    show = warnings.showwarning

    def drop(message, *args, **kwargs):
        found = UNREADABLE.match(str(message))
        if not found:
            return show(message, *args, **kwargs)
        for entry in Path(folder).glob(f"{found[1]}-*"):
            with contextlib.suppress(OSError):
                entry.unlink()
        log.warning("%s in %s cannot be read; it is compiled anew", found[1], folder)

    warnings.showwarning = drop


def compile_ahead(lowered: jax.stages.Lowered) -> str:
    """Compiles what `jit(f).lower(...)` gave, so that the first call of f need not.

    Returns:
      Whether that was done or the program was found in the cache, and the time it took.
    """
    start = time.perf_counter()
    with _reads() as seconds:
        lowered.compile()
    if seconds:
        folder = jax.config.jax_compilation_cache_dir
        return f"compiled program found in {folder}, read in {seconds[0]:.1f} s"
    return f"compiled in {time.perf_counter() - start:.1f} s"


@contextlib.contextmanager
def _reads() -> Iterator[list[float]]:
    """Collects the seconds of each read from the cache."""
    seconds = []

    def listen(event: str, duration: float, **_):
        if event == READ:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
