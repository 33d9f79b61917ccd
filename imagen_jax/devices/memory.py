"""Checks that a run fits on its devices, and chooses what the config leaves to their memory."""

from __future__ import annotations

import dataclasses
import math
import os
from typing import Any

import jax

from imagen_jax.common.errors import UserError
from imagen_jax.devices import sharding

# Free bytes, after state and gradients, that a device needs to run Config.device_batch examples at
# once: with almost nothing recomputed ("kept") and with every block recomputed (docs/scaling.md).
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
            f"{num_params / 1e9:.2f}B parameters at batch {batch_size} need at "
            f"least {needed / 2**30:.1f} GiB per device; {jax.device_count()} device(s) here have "
            f"{available / 2**30:.1f} GiB each: raise config.mesh.fsdp on more devices, lower "
            "config.batch_size, or try the small recipe, --config=configs/base64.py:tiny"
        )


def fill_tiles(
    config: sharding.MeshConfig, batch_size: int, microbatches: int, devices: list[jax.Device]
) -> sharding.MeshConfig:
    """Replaces tensor=0 by 1 or, if TPUs would get fewer examples than a tile has rows, by 2 or 4.

    A TPU lays the batch out along a tile's 8 rows, so fewer examples move as many bytes
    (docs/scaling.md).

    Args:
      microbatches: the config's; 0 if not yet chosen.
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
    """Returns the remat policy and the number of microbatches, chosen by memory if left open.

    Args:
      mesh: the device mesh.
      state: weights, EMA and optimizer state, with shapes and shardings.
      params: the weights alone.
      available: bytes of memory per device.
      batch_size: examples per step, over all devices.
      microbatches: the config's; 0 leaves the number to this function.
      device_batch: the config's, see `count_microbatches`.
      remat: the config's; "" leaves the policy to this function.
      scanned: whether the network scans its blocks.
    """
    # Gradients count twice: those of one microbatch, and their sum.
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
    """Returns the policy that recomputes least among those that fit.

    Args:
      room: a device's free bytes after state and gradients.
      times: examples that a device runs at once, as a multiple of Config.device_batch.
      scanned: whether blocks run in a scan. A scan stores everything its backward pass reads, one
        copy per iteration.
    """
    if room < ROOM["kept"] * times:
        return "block"
    return "save_products" if scanned else "none"


def count_microbatches(
    mesh: Any, batch_size: int, device_batch: int, room: float, remat: str
) -> int:
    """Returns the smallest number of equal microbatches whose share fits on a device at once.

    Args:
      device_batch: examples that fit in ROOM for `remat`; twice the room fits twice as many.
      room: a device's free bytes after state and gradients.
    """
    times = max(room, 1.0) / ROOM["block" if remat == "block" else "kept"]
    most = max(1, int(device_batch * 2.0 ** math.floor(math.log2(times))))
    share = max(1, batch_size // sharding.batch_ways(mesh))
    return next(n for n in range(1, share + 1) if share % n == 0 and share // n <= most)


def device_memory() -> float:
    """Returns the bytes of memory of one local device; CPU devices share the machine's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit", physical_memory() / jax.local_device_count())


def physical_memory() -> int:
    """Returns the bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
