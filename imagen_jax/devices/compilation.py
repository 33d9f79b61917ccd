"""Compiler options, the on-disk cache of compiled programs, and compiling before the first call."""

from __future__ import annotations

import contextlib
import os
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import jax

from imagen_jax.common.cli import log
from imagen_jax.common.files import probe_folder

DEFAULT = "~/.cache/imagen_jax/xla"
# JAX records this event, with the seconds it took, for each program it reads from the cache.
READ = "/jax/compilation_cache/cache_retrieval_time_sec"
# Options of the training step by platform. Without this one, a TPU idles during all-gathers.
OPTIONS = {"tpu": {"xla_enable_async_all_gather": True}}
UNREADABLE = re.compile(r"Error reading persistent compilation cache entry for '(\w+)'")


def use_cache(folder: str | None) -> None:
    """Makes JAX cache compiled programs in a folder, if compiling took a second or more.

    If the folder cannot be written, logs a warning, and the run goes on without a cache.

    Args:
      folder: None means $JAX_COMPILATION_CACHE_DIR or else DEFAULT; "" means no cache.
    """
    if folder is None:
        folder = os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT)
    if folder:
        # XLA splits a CPU's loops over the available cores, but their number is not part of the
        # cache key: a process with many cores would find and use a slow program made for one core.
        folder = os.path.join(os.path.expanduser(folder), f"cores_{_cores()}")
    if folder and "://" not in folder:
        folder = os.path.abspath(folder)
        if _writable(folder):
            _replace_unreadable(folder)
        else:
            folder = ""
    jax.config.update("jax_compilation_cache_dir", folder or None)


def _cores() -> int:
    """Returns the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _writable(folder: str) -> bool:
    """Creates the folder if missing; logs a warning and returns False if it cannot be written."""
    try:
        probe_folder(Path(folder))
    except OSError as e:
        log.warning("no compilation cache: %s cannot be written (%s)", folder, e.strerror)
        return False
    return True


def _replace_unreadable(folder: str) -> None:
    """Deletes cache entries that JAX cannot read, such as one half written by a killed process.

    JAX recompiles such a program and warns, but never overwrites an existing entry.
    """
    show = warnings.showwarning

    def drop(message, *args, **kwargs):
        found = UNREADABLE.match(str(message))
        if not found:
            return show(message, *args, **kwargs)
        for entry in Path(folder).glob(f"{found[1]}-*"):
            with contextlib.suppress(OSError):
                entry.unlink()
        log.warning("%s in %s cannot be read; recompiling it", found[1], folder)

    warnings.showwarning = drop


def compile_ahead(lowered: jax.stages.Lowered) -> str:
    """Compiles what `jit(f).lower(...)` returns, so that the first call of f does not.

    Returns:
      A line for the log: whether the program was compiled or found in the cache, and the time.
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
    """Collects the seconds of each read from the compilation cache."""
    seconds = []

    def listen(event: str, duration: float, **_):
        if event == READ:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seconds
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
