"""Whether a run fits on its devices, and what is left to them and their memory to decide."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax

from imagen_jax.common.errors import UserError
from imagen_jax.devices import sharding

# Bytes beside state and gradients in which a device takes Config.device_batch examples at once:
# recomputing next to nothing, and recomputing every block (docs/scaling.md).
ROOM = {"kept": 11 * 2**30, "block": 7 * 2**30}


def check_fits(
    state: Any, params: Any, *, activations: float, batch_size: int, available: float
) -> None:
    """Raises UserError, with the figures, if a device of `available` bytes cannot hold the run.

    Args:
      state: weights, EMA and optimizer state, with shapes and shardings.
      params: the weights alone. Gradients take as much again.
      activations: bytes of activations per device that every run needs.
    """
    num_params = sum(x.size for x in jax.tree.leaves(params))
    needed = sharding.bytes_per_device(state) + sharding.bytes_per_device(params) + activations
    if needed > available:
        raise UserError(
            f"{num_params / 1e9:.2f}B parameters at batch {batch_size} need at least "
            f"{needed / 2**30:.1f} GiB a device; each of {jax.device_count()} device(s) here has "
            f"{available / 2**30:.1f} GiB: raise config.mesh.fsdp on more devices, lower "
            "config.batch_size, or try the recipe small with --config=configs/base64.py:tiny"
        )


def fill_tiles(
    config: sharding.MeshConfig, batch_size: int, microbatches: int, devices: list[jax.Device]
) -> sharding.MeshConfig:
    """With tensor 0 replaced: up to 4 TPUs share examples if each had less than a tile's rows.

    A TPU lays the batch along those rows, and with fewer moves as many bytes (docs/scaling.md).

    Args:
      microbatches: of the config; 0 if they are to be chosen.
    """
    if config.tensor:
        return config
    at_once = batch_size // max(microbatches, 1)
    choices = [dataclasses.replace(config, tensor=ways) for ways in (1, 2, 4)]
    if devices[0].platform != "tpu":
        return choices[0]
    possible = [c for c in choices if c.covers(len(devices))] or choices[:1]
    rows = sharding.TILE[0] * len(devices)
    return next((c for c in possible if at_once * c.tensor >= rows), possible[-1])


def choose(
    mesh: sharding.Mesh,
    state: Any,
    params: Any,
    available: float,
    *,
    batch_size: int,
    microbatches: int,
    device_batch: int,
    remat: str,
    scanned: bool,
) -> tuple[str, int]:
    """The remat policy and the number of microbatches: the config's, or what memory allows.

    Args:
      mesh: the device mesh.
      state: weights, EMA and optimizer state, with shapes and shardings.
      params: the weights alone.
      available: bytes of memory per device.
      batch_size: of the global batch.
      microbatches: of the config; 0 leaves the number to this function.
      device_batch: of the config, see `count_microbatches`.
      remat: of the config; "" leaves the policy to this function.
      scanned: whether the network scans its blocks.
    """
    # Gradients twice: those of a microbatch, and their sum.
    gradients = 2 * sharding.bytes_per_device(params)
    room = available - sharding.bytes_per_device(state) - gradients
    times = 1.0
    if microbatches and device_batch:
        at_once = batch_size / sharding.batch_ways(mesh) / microbatches
        times = max(1.0, at_once / device_batch)
    remat = remat or choose_remat(room, times, scanned)
    microbatches = microbatches or count_microbatches(mesh, batch_size, device_batch, room, remat)
    return remat, microbatches


def choose_remat(room: float, times: float, scanned: bool) -> str:
    """The policy that recomputes least of those that a device has room for.

    Args:
      room: bytes of a device beside state and gradients.
      times: how many times Config.device_batch it takes at once.
      scanned: whether blocks run in a scan, which stores all that its backward pass reads, a copy
        a turn.
    """
    if room < ROOM["kept"] * times:
        return "block"
    return "save_products" if scanned else "none"


def count_microbatches(
    mesh: Any, batch_size: int, device_batch: int, room: float, remat: str
) -> int:
    """As few equal parts of the batch as let a device take its share of one at once.

    Args:
      device_batch: examples that a device takes at once in the ROOM for `remat`; in twice as much,
        twice as many.
      room: bytes of a device beside state and gradients.
    """
    times = max(room, 1.0) / ROOM["block" if remat == "block" else "kept"]
    most = max(1, int(device_batch * 2.0 ** math.floor(math.log2(times))))
    share = max(1, batch_size // sharding.batch_ways(mesh))
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)


def device_memory() -> float:
    """Bytes of the memory of a device that is here; a CPU's devices share the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", physical_memory() / jax.local_device_count())


def physical_memory() -> int:
    """Bytes of this machine's own memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
