"""Fills a frozen network with the tensors of a published file, and returns it as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util

from imagen_jax.common.errors import UserError
from imagen_jax.formats.tensors import StoredTensor, read_safetensors
from imagen_jax.formats.torch import read_torch

# Path of a weight in a module: ("blocks", 3, "attention", "query", "kernel").
Key = tuple[str | int, ...]
Weights = Any  # a pytree of arrays
# (weights, inputs...) -> features float32 [B, D].
Apply = Callable[..., jax.Array]

# Our names of weights -> PyTorch's.
LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}


class Opened:
    """A network whose file has been checked. `load` reads the weights."""

    def __init__(
        self, path: Path, build: Callable[..., nnx.Module], stored_name: Callable[[Key], str]
    ):
        """Finds every weight of a module in a file, without reading the numbers.

        Args:
          path: a .safetensors file, or a state dict that torch saved.
          build: returns the module, given `rngs`.
          stored_name: maps a weight's key to its name in the file.

        Raises:
          UserError: the file is damaged, lacks a tensor, or has one of another shape or dtype.
        """
        read = read_safetensors if path.suffix == ".safetensors" else read_torch
        tensors, module = read(path), nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0)))
        self._graphdef, self._state = nnx.split(module)
        specs = traverse_util.flatten_dict(nnx.to_pure_dict(self._state))
        self._tensors = {
            key: _checked(path, tensors, stored_name(key), spec.shape, _order(key, spec.shape))
            for key, spec in specs.items()
        }

    def load(self) -> tuple[Apply, Weights]:
        """Reads the weights as float32. Returns the network as a pure function, and the weights."""
        read = {key: _read(key, tensor) for key, tensor in self._tensors.items()}
        graphdef, state = self._graphdef, self._state
        nnx.replace_by_pure_dict(state, traverse_util.unflatten_dict(read))
        return lambda weights, *inputs: nnx.merge(graphdef, weights)(*inputs), state


def _order(key: Key, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the axes of a stored tensor in our order: kernels are [..., in, out] here."""
    axes = tuple(range(len(shape)))
    return (*axes[2:], 1, 0) if key[-1] == "kernel" else axes


def _checked(
    path: Path,
    tensors: Mapping[str, StoredTensor],
    name: str,
    shape: tuple[int, ...],
    order: tuple[int, ...],
) -> StoredTensor:
    expected = tuple(shape[order.index(axis)] for axis in range(len(shape)))
    tensor = tensors.get(name)
    if tensor is None:
        raise UserError(f"{path}: tensor {name!r} is missing; this file has another network")
    if tensor.shape != expected or not jnp.issubdtype(tensor.dtype, jnp.floating):
        raise UserError(
            f"{path}: tensor {name!r} is {tensor.dtype} {tensor.shape}; expected float32 "
            f"{expected}; this file has another network"
        )
    return tensor


def _read(key: Key, tensor: StoredTensor) -> np.ndarray:
    stored = tensor.read((slice(None),) * len(tensor.shape))
    return np.ascontiguousarray(stored.transpose(_order(key, tensor.shape)), np.float32)
