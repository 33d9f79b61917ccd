"""Loads an encoder from a checkpoint onto its devices, one tensor at a time."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from tqdm import tqdm

from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import sha256
from imagen_jax.formats.tensors import StoredTensor

# Suffixes of an encoder's name. RANDOM: the architecture with random weights. BFLOAT16: weights
# rounded to bfloat16, which halves their memory.
RANDOM, BFLOAT16 = VARIANTS = ("-random", "-bfloat16")

# Path of a weight in a module: ("blocks", 3, "attention", "query", "kernel").
Key = tuple[str | int, ...]
# Maps a tree of jax.ShapeDtypeStruct to a tree of shardings, for example
# functools.partial(sharding.weight_shardings, mesh).
Place = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An encoder's open files. Everything is known except the weights, which are not read yet.

    Attributes:
      module: the network, built as `module(config, rngs=...)`.
      config: has `dim`, `vocab_size` and `max_positions` (None for no limit).
      tensors: the stored tensors by their names in the files.
      stored_name: maps a weight's key in the module to its name in the files.
      kernels_reversed: whether the files store projections as [out, in]; ours are [in, out].
      files: all weight files, in the order in which they are hashed.
      tokenizer: a key of `tokenizer.TOKENIZERS`.
      variant: "" or one of VARIANTS. Random weights come from a fixed seed, so they are always
        the same. They show how much of an encoder's value comes from its training.
    """

    folder: Path
    module: type[nnx.Module]
    config: Any
    tensors: dict[str, StoredTensor]
    stored_name: Callable[[Key], str]
    kernels_reversed: bool
    files: list[Path]
    tokenizer: str
    variant: str = ""

    @property
    def name(self) -> str:
        """Name of the encoder in identities."""
        return self.folder.name + self.variant

    @property
    def weights_sha256(self) -> str:
        """Hash of all weight files; for random weights, of the recipe that generates them."""
        if self.variant == RANDOM:
            return sha256([], f"{self.config} drawn with seed 0".encode())
        return sha256(self.files)

    @property
    def dtype(self) -> np.dtype:
        """Type of the weights in memory, whatever the type in the files."""
        return np.dtype(jnp.bfloat16 if self.variant == BFLOAT16 else np.float32)

    def load(self, place: Place | None = None) -> nnx.Module:
        """Loads the encoder. Each weight reaches its devices before the next one is read.

        Args:
          place: shardings of the weights (default: the default device). A process reads only the
            parts that its own devices hold.

        Raises:
          UserError: a tensor is missing, has the wrong shape, or is quantized to integers.
        """
        module = nnx.eval_shape(lambda: self.module(self.config, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(module)
        specs = traverse_util.flatten_dict(nnx.to_pure_dict(state))
        shardings = dict.fromkeys(specs)
        if place is not None:
            shardings = traverse_util.flatten_dict(place(traverse_util.unflatten_dict(specs)))
        if self.variant == RANDOM:
            weights = self._random(shardings)
        else:
            stored = {key: self._checked(key, spec) for key, spec in specs.items()}
            weights = {
                key: _put(stored[key], shardings[key], self.dtype)
                for key in sorted(specs, key=_without_number)
            }
        nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(weights))
        num_bytes = sum(weight.nbytes for weight in weights.values())
        with tqdm.external_write_mode(sys.stderr):  # clears open progress bars for the line
            log.info(
                "text encoder %s: %.3g GB of weights; peak host memory so far: %.3g GB",
                self.name, num_bytes / 1e9, peak_host_bytes() / 1e9,
            )  # fmt: skip
        return nnx.merge(graphdef, state)

    def _random(self, shardings: dict[Key, Any]) -> dict[Key, jax.Array]:
        module = self.module(self.config, rngs=nnx.Rngs(0))
        weights = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(module)))
        return {key: jax.device_put(weight, shardings[key]) for key, weight in weights.items()}

    def _checked(self, key: Key, spec: jax.ShapeDtypeStruct) -> StoredTensor:
        name = self.stored_name(key)
        reverse = self.kernels_reversed and key[-1] == "kernel"
        expected = spec.shape[::-1] if reverse else spec.shape
        tensor = self.tensors.get(name)
        if tensor is None:
            raise UserError(f"{self.folder}: tensor {name!r} is missing; expected shape {expected}")
        if tensor.shape != expected:
            raise UserError(
                f"{self.folder}: tensor {name!r} has shape {tensor.shape}; "
                f"its config requires {expected}"
            )
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(
                f"{self.folder}: tensor {name!r} has dtype {tensor.dtype}; "
                "quantized weights are not supported"
            )
        return tensor.T if reverse else tensor


def _without_number(key: Key) -> list[str]:
    """Returns a sort key that groups the same weight of all blocks; they may share one array."""
    return [part for part in key if isinstance(part, str)]


def peak_host_bytes() -> int:
    """Returns the peak memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _put(tensor: StoredTensor, sharding: Any, dtype: np.dtype) -> jax.Array:
    """Copies a tensor to its devices and releases the host memory."""
    parts: dict[tuple, np.ndarray] = {}

    def part(index: tuple[slice, ...]) -> np.ndarray:
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, tensor.shape, strict=True))
        if bounds not in parts:  # several devices may hold one part
            parts[bounds] = tensor.read(index).astype(dtype, copy=False)
        return parts[bounds]

    if sharding is None:
        array = jnp.asarray(part((slice(None),) * len(tensor.shape)))
    else:
        array = jax.make_array_from_callback(tensor.shape, sharding, part)
    return jax.block_until_ready(array)  # a pending transfer keeps its host memory
