"""The host's memory in a run on CPUs."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys

# Options of glibc's mallopt, by the numbers in malloc.h, and their values: one arena for all
# threads, because others cannot hold large blocks; blocks below 1 GiB from the heap; a heap that
# never shrinks.
OPTIONS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_THRESHOLD": (-3, 2**30), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_freed_memory() -> None:
    """Makes glibc keep large blocks that a run on CPUs frees; call it before JAX finds its devices.

    By default glibc returns them to the system. Each training step then gets its temporary arrays
    as new pages, which the system fills with zeros: up to a third of the time of a small step.
    Does nothing if JAX may use other devices, whose hosts rather need an arena per thread, or if
    the C library is not glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and _only_cpus():
        for option, value in OPTIONS.values():
            mallopt(option, value)


def _only_cpus() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
