"""Whether a run fits on its devices, asked before anything slow starts."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from imagen_jax import sharding
from imagen_jax.errors import UserError


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
