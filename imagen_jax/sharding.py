"""The mesh, and how weights and batches lie on it. The only module that knows jax.sharding.

Weight shardings are inferred from shapes, outside the model (ZeRO-3): every large weight is split
over `fsdp` along its largest divisible axis, with its EMA and optimizer state beside it, and is
gathered where it is used, inside the rematerialised block (`block_runner`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.config import require
from imagen_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
REMAT = ("none", "block")

# A weight smaller than this is not worth a collective; it stays replicated.
MIN_SHARDED_SIZE = 2**16


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Config section `mesh`: the size of each axis (-1 takes the devices that are left).

    Attributes:
      data: replicas of the model, each with its part of the batch.
      fsdp: the batch and the weights are both split over this axis.
      tensor: reserved for tensor parallelism; 1 for now.
      remat: "none" keeps activations for the backward pass, "block" recomputes each block.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    remat: str = "none"

    def __post_init__(self):
        require(self.remat in REMAT, "mesh.remat", self.remat, ", ".join(REMAT))
        require(self.tensor == 1, "mesh.tensor", self.tensor, 1)
        for axis in AXES:
            size = getattr(self, axis)
            require(size == -1 or size > 0, f"mesh.{axis}", size, "-1 or a positive number")
        sizes = [getattr(self, axis) for axis in AXES]
        require(sizes.count(-1) <= 1, "mesh", tuple(sizes), "at most one axis of size -1")


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The device mesh with axes AXES.

    Raises:
      UserError: if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(s for s in sizes if s != -1)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{a}={getattr(config, a)}" for a in AXES)
        raise UserError(f"config.mesh is {shape}; it must multiply to {len(devices)} devices")
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises UserError unless every device gets the same whole number of examples a microbatch."""
    ways = batch_ways(mesh)
    unit = ways * microbatches
    if batch_size <= 0 or batch_size % unit:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of {unit} "
            f"({ways} devices x {microbatches} microbatches)"
        )


def weight_shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array (or ShapeDtypeStruct) of a state, from its shape alone."""
    ways = mesh.shape["fsdp"]

    def leaf(x):
        divisible = [d for d in range(len(x.shape)) if x.shape[d] % ways == 0]
        if ways == 1 or math.prod(x.shape) < MIN_SHARDED_SIZE or not divisible:
            return NamedSharding(mesh, P())
        axis = max(divisible, key=lambda d: x.shape[d])
        return NamedSharding(mesh, P(*("fsdp" if d == axis else None for d in range(axis + 1))))

    return jax.tree.map(leaf, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices that share the batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows -> global arrays whose rows are those of all hosts, in host order."""
    sharding = batch_sharding(mesh)
    # In a run of many processes JAX takes this transfer, asked for here, for an accidental one.
    with jax.transfer_guard_host_to_device("allow"):
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()}


def with_shardings(tree: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry shardings, as checkpoints and AOT compilation want them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def bytes_per_device(tree: Any) -> int:
    """Bytes that one device holds of a tree of arrays, or of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def block_runner(mesh: Mesh, remat: str) -> Callable[..., Any]:
    """Runs a model's block as `run(fn, params, *arrays)`, gathering its weights at use.

    With plain FSDP shardings XLA's partitioner un-shards the batch instead of the weights, which
    does not fit on a chip. Constraining the weights to replicated inside jax.checkpoint, and the
    activations to the batch sharding at the block's border, keeps one block's weights at a time.
    """
    batch, whole = batch_sharding(mesh), replicated(mesh)
    sharded = mesh.shape["fsdp"] > 1

    def on_batch(x):  # everything but the dropout key, a scalar, has the batch first
        return jax.lax.with_sharding_constraint(x, batch) if x.ndim else x

    def gathered(fn, params, *arrays):
        if sharded:
            params = jax.lax.with_sharding_constraint(params, whole)
            arrays = jax.tree.map(on_batch, arrays)
        return fn(params, *arrays)

    def run(fn, params, *arrays):
        step = jax.checkpoint(gathered, static_argnums=(0,)) if remat == "block" else gathered
        return step(fn, params, *arrays)

    return run
