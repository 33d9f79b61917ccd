"""Freed blocks stay with a process that runs on CPUs."""

import subprocess
import sys

import pytest

# Frees a block of 64 MiB in a thread of its own, again and again, and counts the pages it gets.
PROGRAM = """
import ctypes, resource, sys, threading
from imagen_jax.devices.host_memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def allocate():
    for _ in range(20):
        block = libc.malloc(64 * 2**20)
        ctypes.memset(block, 1, 64 * 2**20)
        libc.free(block)

before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
thread = threading.Thread(target=allocate)
thread.start()
thread.join()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str, platforms: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how],
        env={"JAX_PLATFORMS": platforms, "GLIBC_TUNABLES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_run_on_cpus_gets_the_pages_of_a_freed_block_again():
    usual = faults("default", "cpu")
    assert faults("keep", "cpu") < usual / 5
    assert faults("keep", "tpu,cpu") > usual / 2
