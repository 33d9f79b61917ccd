"""The device mesh and the shardings of weights and batches. The only user of jax.sharding.

Weight shardings are inferred from shapes, outside the model. Every large weight, its EMA and its
optimizer state are sharded over `fsdp` (ZeRO-3), and over `tensor` along the output channels. Each
weight is all-gathered along `fsdp` where it is used (`block_runner`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax.common.errors import UserError
from imagen_jax.common.typed_config import require

AXES = ("slice", "data", "fsdp", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")

# Rematerialization policies by name: which activations of a block are saved for the backward pass.
# Every policy but "none" gathers the weights again.
_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Callable[..., Any]] = {
    "none": _POLICIES.everything_saveable,  # block_runner then skips jax.checkpoint
    "save_products": _POLICIES.save_only_these_names("conv", "product", "attention", "statistics"),
    "save_attention": _POLICIES.save_only_these_names("attention"),
    "block": _POLICIES.nothing_saveable,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=["statistics"],
        names_which_can_be_offloaded=["conv", "product", "attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

# A weight smaller than this is not worth a collective; it stays replicated.
MIN_SHARDED_SIZE = 2**16
# Rows and columns of a TPU's tile. If a shard is smaller than a tile, XLA cannot all-gather it; it
# zero-pads every shard to full size and sums them.
TILE = (8, 128)
# Sharded 64 ways, the state of the 2B model takes 0.25 GiB per device, and a shard of its narrowest
# matrix, 512 rows, is still a whole tile. Slices of up to 64 devices shard 8 ways: over a whole
# slice, XLA exchanges activations or sums whole weights (docs/scaling-log.md).
MOST_FSDP, FEW_FSDP = 64, 8


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Config section `mesh`: the size of each axis. -1 takes the remaining devices.

    Attributes:
      topology: the TPU slice that the run needs, such as "v4-512"; "" accepts any devices.
      slice: number of TPU slices joined by the data center's network; each takes an equal part of
        the batch. With a topology, the number of such slices.
      data: replicas of the model; each takes an equal part of the batch.
      fsdp: devices that shard both the batch and the weights. 0 chooses: MOST_FSDP if the slice is
        a larger multiple of it, otherwise up to FEW_FSDP.
      tensor: devices that shard the output channels of weights, and so attention heads. 0 chooses:
        1, or on TPUs 2 or 4 if a chip would have fewer than 8 examples.
      remat: what the backward pass recomputes in each block: "none" nothing (activations and
        gathered weights stay in memory), "save_products" all but convolutions, a transformer's
        matrix products, attention and the statistics of norms, "save_attention" all but attention,
        "block" everything; "offload" is save_products with the products in the host's memory. ""
        chooses by the device's memory (memory.choose_remat).
    """

    topology: str = ""
    slice: int = 1
    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    remat: str = "none"

    def __post_init__(self):
        known = self.remat in ("", *REMAT)
        require(known, "mesh.remat", self.remat, f'{", ".join(REMAT)}, or "" to choose')
        for axis in AXES:
            size = getattr(self, axis)
            ok = size == -1 or size > 0 or (axis in ("fsdp", "tensor") and size == 0)
            require(ok, f"mesh.{axis}", size, "-1, a positive number, or 0 for fsdp and tensor")
        sizes = [getattr(self, axis) for axis in AXES]
        require(sizes.count(-1) <= 1, "mesh", tuple(sizes), "at most one axis with size -1")
        known = not self.topology or self.slice > 0
        require(known, "mesh.slice", self.slice, "a positive number when mesh.topology is set")

    def covers(self, num_devices: int) -> bool:
        """Returns whether the sizes multiply to `num_devices`."""
        try:
            return bool(self.sizes(num_devices))
        except UserError:
            return False

    def sizes(self, num_devices: int) -> dict[str, int]:
        """Returns the size of each axis on `num_devices` devices.

        Raises:
          UserError: the sizes do not multiply to `num_devices`.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        sizes["tensor"] = sizes["tensor"] or 1  # unless memory.fill_tiles has chosen
        if self.fsdp == 0:
            others = math.prod(max(sizes[a], 1) for a in AXES if a != "fsdp")
            ways = max(num_devices // others, 1)
            many = ways > MOST_FSDP and ways % MOST_FSDP == 0
            sizes["fsdp"] = math.gcd(ways, MOST_FSDP if many else FEW_FSDP)
        known = math.prod(s for s in sizes.values() if s != -1)
        sizes = {a: num_devices // known if s == -1 else s for a, s in sizes.items()}
        if math.prod(sizes.values()) != num_devices:
            shape = " x ".join(f"{a}={getattr(self, a)}" for a in AXES)
            raise UserError(f"config.mesh is {shape}; it must multiply to {num_devices} devices")
        return sizes


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the device mesh with axes AXES; devices along `tensor`, then `fsdp`, are closest.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or the number of slices
        differs from `slice`.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(config.sizes(len(devices)).values())
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform == "tpu" and slices != sizes[0]:
        raise UserError(
            f"config.mesh.slice is {sizes[0]}; the {len(devices)} devices form {slices} slice(s)"
        )
    if 1 < slices == sizes[0]:
        inner, outer = (1, *sizes[1:]), (sizes[0], 1, 1, 1)
        array = mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    else:
        array = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_ways(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Returns the index of this host's share of a batch's rows, and the number of shares.

    Hosts joined along `tensor` read the same share.

    Raises:
      UserError: two hosts would share some of their rows, but not all.
    """
    rows: dict[int, set[int]] = {}
    ways = batch_ways(mesh)
    for device, (row,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    shares = sorted({tuple(sorted(each)) for each in rows.values()})
    if len(shares) * len(shares[0]) != ways:
        raise UserError(
            f"config.mesh.tensor is {mesh.shape['tensor']}: hosts would share some of their rows; "
            "allowed: the number of devices of a host, or a multiple or divisor of it"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises UserError unless every microbatch divides evenly over the devices."""
    ways = batch_ways(mesh)
    unit = ways * microbatches
    if batch_size <= 0 or batch_size % unit:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of {unit} "
            f"({ways} devices x {microbatches} microbatches)"
        )


def _weight_spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
    """Returns a weight's PartitionSpec, inferred from its shape [..., in, out].

    `tensor` shards the output channels. `fsdp` shards the largest of the other dimensions whose
    shards are whole tiles; if there is none, the largest that it divides.
    """
    if not shape or math.prod(shape) < MIN_SHARDED_SIZE:
        return P()
    last = len(shape) - 1
    spec: list[str | None] = [None] * len(shape)
    if mesh.shape["tensor"] > 1 and shape[last] % mesh.shape["tensor"] == 0:
        spec[last] = "tensor"
    ways = mesh.shape["fsdp"]
    free = [d for d in range(len(shape)) if spec[d] is None and shape[d] % ways == 0]
    if ways > 1 and free:
        whole = {last - 1: TILE[0] * ways, last: TILE[1] * ways}
        axis = max(free, key=lambda d: (shape[d] % whole.get(d, 1) == 0, shape[d]))
        spec[axis] = "fsdp"
    return P(*spec)


def weight_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns a NamedSharding for every array (or ShapeDtypeStruct) of a state, by its shape."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _weight_spec(mesh, x.shape)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Shards the leading axis over all devices that share the batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Puts the whole array on every device."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Assembles global arrays from every host's rows; `local` has this host's `batch_share`."""
    sharding = batch_sharding(mesh)
    # With several processes, JAX's transfer guard mistakes this transfer for an implicit one.
    with jax.transfer_guard_host_to_device("allow"):
        return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in local.items()}


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Returns ShapeDtypeStructs with shardings, which checkpoints and AOT compilation need."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes per device of a tree of arrays, or of ShapeDtypeStructs with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def gatherer(mesh: Mesh, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that all-gathers a weight along `fsdp`, cast first to halve the traffic.

    The gradient is constrained to the weight's own sharding. Only then does XLA reduce-scatter it;
    otherwise it sums whole gradients on every device.

    Args:
      dtype: type of the gathered weight, usually bfloat16.
    """

    def constrain(x, spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    @jax.custom_vjp
    def gather(x):
        spec = _weight_spec(mesh, x.shape)
        if "fsdp" not in spec:
            return x
        gathered = P(*(None if axis == "fsdp" else axis for axis in spec))
        return constrain(constrain(x.astype(dtype), spec), gathered)

    def backward(like, g):
        return (constrain(g.astype(like.dtype), _weight_spec(mesh, g.shape)),)

    gather.defvjp(lambda x: (gather(x), jnp.zeros((), x.dtype)), backward)
    return gather


def block_runner(mesh: Mesh, remat: str, dtype: Any) -> Callable[..., Any]:
    """Returns `run(fn, params, *arrays)`, which runs a model's block and gathers its weights.

    With plain FSDP shardings, XLA's partitioner unshards the batch instead of the weights, and the
    program does not fit on a chip. So the runner constrains a block's weights to be whole inside
    the block (and inside jax.checkpoint), and its inputs to the sharding of the batch.

    Args:
      remat: a key of REMAT.
      dtype: type of the activations; weights are cast to it before they are gathered.
    """
    batch, gather = batch_sharding(mesh), gatherer(mesh, dtype)
    split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1

    def on_batch(x):  # only the dropout key, a scalar, has no leading batch axis
        return jax.lax.with_sharding_constraint(x, batch) if x.ndim else x

    def gathered(fn, params, *arrays):
        if split:
            params = jax.tree.map(gather, params)
            arrays = jax.tree.map(on_batch, arrays)
        return fn(params, *arrays)

    def run(fn, params, *arrays):
        if remat == "none":  # jax.checkpoint rounds everything it saves, an extra pass over it
            return gathered(fn, params, *arrays)
        # Barriers (prevent_cse) keep XLA from merging recomputed products with the originals. With
        # products saved, barriers only make XLA store, in float32, activations that it could fuse.
        step = jax.checkpoint(
            gathered,
            static_argnums=(0,),
            policy=REMAT[remat],
            prevent_cse=remat != "save_products",
        )
        return step(fn, params, *arrays)

    return run
