"""Whether a run fits on its devices, and what is left to them and their memory to decide."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from imagen_jax import sharding
from imagen_jax.errors import UserError

# Bytes beside state and gradients in which a device takes Config.device_batch examples at once:
# recomputing next to nothing, and recomputing every block (docs/scaling.md).
ROOM = {"kept": 11 * 2**30, "block": 7 * 2**30}


def check_fits(built: Any, available: float) -> None:
    """Raises UserError, with the figures, if a device of `available` bytes cannot hold the run.

    Counted is what every run needs at the least: weights, EMA, optimizer state, gradients, and the
    input and output of one block at the first level.

    Args:
      built: an Experiment.
    """
    weights = sharding.bytes_per_device(built.abstract_state.params)
    config = built.config
    side, channels = config.unet.first_level
    block = config.batch_size * side**2 * channels * jnp.dtype(config.unet.dtype).itemsize
    activations = 2 * block / (built.batch_ways * built.microbatches)
    # Gradients are as large as the weights.
    needed = built.state_bytes_per_device + weights + activations
    if needed > available:
        raise UserError(
            f"{built.num_params / 1e9:.2f}B parameters at batch {config.batch_size} need at least "
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


def choose(config: Any, mesh: Any, state: Any, memory: float) -> tuple[str, int]:
    """The remat policy and the number of microbatches; what the config leaves open, memory decides.

    Args:
      config: of the run.
      mesh: the device mesh.
      state: a TrainState, its leaves with shapes and shardings.
      memory: bytes of a device.
    """
    # Gradients twice: those of a microbatch, and their sum.
    gradients = 2 * sharding.bytes_per_device(state.params)
    room = memory - sharding.bytes_per_device(state) - gradients
    times = 1.0
    if config.microbatches and config.device_batch:
        at_once = config.batch_size / sharding.batch_ways(mesh) / config.microbatches
        times = max(1.0, at_once / config.device_batch)
    scanned = getattr(config.unet, "scan_blocks", False)
    remat = config.mesh.remat or choose_remat(room, times, scanned)
    microbatches = config.microbatches or count_microbatches(
        mesh, config.batch_size, config.device_batch, room, remat
    )
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
