"""The mesh, and how weights and batches lie on it. The only module that knows jax.sharding.

Weight shardings are inferred from shapes, outside the model. Every large weight is split over
`fsdp`, with its EMA and optimizer state beside it (ZeRO-3), and over `tensor` along its output
channels; the part that `fsdp` took away is gathered where the weight is used (`block_runner`).
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

# Rematerialization by name: what the backward pass finds of a block's forward pass. Where not all
# of it, weights are gathered again.
_POLICIES = jax.checkpoint_policies
REMAT: dict[str, Callable[..., Any]] = {
    "none": _POLICIES.everything_saveable,  # block_runner then does without jax.checkpoint
    "save_products": _POLICIES.save_only_these_names("conv", "attention", "statistics"),
    "save_attention": _POLICIES.save_only_these_names("attention"),
    "block": _POLICIES.nothing_saveable,
    "offload": _POLICIES.save_and_offload_only_these_names(
        names_which_can_be_saved=["statistics"],
        names_which_can_be_offloaded=["conv", "attention"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}

# A weight smaller than this is not worth a collective; it stays replicated.
MIN_SHARDED_SIZE = 2**16
# Rows and columns of a TPU's tile. Of a weight that is split finer XLA gathers no parts: it adds up
# whole arrays of zeros around them.
TILE = (8, 128)
# At 64 ways the 2B model's weights, EMA and optimizer state are 0.25 GiB a device, and a part of
# its narrowest matrix, 512 rows, still is a tile. Where there are no more than 64, 8 do: split over
# a whole slice, XLA exchanges activations (16 or 32 ways) or sums whole weights (docs/scaling.md).
MOST_FSDP, FEW_FSDP = 64, 8


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Config section `mesh`: the size of each axis (-1 takes the devices that are left).

    Attributes:
      topology: the TPU slice it is meant for, such as "v4-512"; "" is whatever is there.
      slice: slices of TPUs, joined by the data center's network: one part of the batch each. With
        a topology, how many such slices.
      data: replicas of the model, each with its part of the batch.
      fsdp: the batch and the weights are both split over this axis; 0 is MOST_FSDP devices, or if
        a slice is no larger multiple of that, up to FEW_FSDP.
      tensor: the output channels of weights, and with them heads, are split over this axis; 0 is
        1, or on TPUs 2 or 4 where one would have fewer than 8 examples.
      remat: what of a block is computed anew in the backward pass: "none" (nothing; activations
        and gathered weights are kept), "save_products" (all but its convolutions, attention, and
        norms' statistics: what costs little), "save_attention" (all but its attention), "block"
        (all), or "offload" (as save_products, but products are kept in the host's memory). With ""
        the device's memory decides, see fits.choose_remat.
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
            require(ok, f"mesh.{axis}", size, "-1 or a positive number; 0 of fsdp and tensor")
        sizes = [getattr(self, axis) for axis in AXES]
        require(sizes.count(-1) <= 1, "mesh", tuple(sizes), "at most one axis of size -1")
        known = not self.topology or self.slice > 0
        require(known, "mesh.slice", self.slice, "with mesh.topology, the number of such slices")

    def covers(self, num_devices: int) -> bool:
        """Whether the sizes multiply to so many devices."""
        try:
            return bool(self.sizes(num_devices))
        except UserError:
            return False

    def sizes(self, num_devices: int) -> dict[str, int]:
        """The size of each axis on so many devices.

        Raises:
          UserError: if they do not multiply to that number.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        sizes["tensor"] = sizes["tensor"] or 1  # as long as fits.fill_tiles has not chosen
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
    """The device mesh with axes AXES: neighbours along `tensor`, then `fsdp`, are near each other.

    Raises:
      UserError: if the sizes do not multiply to the devices, or these are of other than `slice`
        slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = tuple(config.sizes(len(devices)).values())
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform == "tpu" and slices != sizes[0]:
        raise UserError(
            f"config.mesh.slice is {sizes[0]}; the {len(devices)} devices are of {slices} slice(s)"
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
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[a] for a in BATCH_AXES)


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this host reads, and how many shares there are.

    Hosts that are joined along `tensor` read the same.

    Raises:
      UserError: if hosts would have only a part of their rows in common.
    """
    rows: dict[int, set[int]] = {}
    ways = batch_ways(mesh)
    for device, (row,) in batch_sharding(mesh).devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).add(row.start or 0)
    shares = sorted({tuple(sorted(each)) for each in rows.values()})
    if len(shares) * len(shares[0]) != ways:
        raise UserError(
            f"config.mesh.tensor is {mesh.shape['tensor']}: hosts would share parts of their rows; "
            "take the devices of a host, or a multiple or divisor of them"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def check_batch(mesh: Mesh, batch_size: int, microbatches: int) -> None:
    """Raises UserError unless every device gets the same whole number of examples a microbatch."""
    ways = batch_ways(mesh)
    unit = ways * microbatches
    if batch_size <= 0 or batch_size % unit:
        raise UserError(
            f"config.batch_size is {batch_size}; it must be a multiple of {unit} "
            f"({ways} devices x {microbatches} microbatches)"
        )


def _weight_spec(mesh: Mesh, shape: tuple[int, ...]) -> P:
    """How a weight is split, from its shape [..., in, out] alone.

    `tensor` takes the output channels. `fsdp` takes the largest of the other axes whose parts are
    whole tiles, else the largest that it divides.
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
    """A NamedSharding for every array (or ShapeDtypeStruct) of a state, from its shape alone."""
    return jax.tree.map(lambda x: NamedSharding(mesh, _weight_spec(mesh, x.shape)), tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices that share the batch."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
    return NamedSharding(mesh, P())


def put_batch(mesh: Mesh, local: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This host's rows, its `batch_share` -> global arrays with the rows of all hosts."""
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


def gatherer(mesh: Mesh, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """Weight -> the same with what `fsdp` split made whole, in `dtype`: half the bytes to send.

    Its gradient is added up and split in one go (reduce-scatter), which XLA only does if told where
    the gradient is to lie.
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
    """Runs a model's block as `run(fn, params, *arrays)`, gathering its weights at use.

    With plain FSDP shardings XLA's partitioner un-shards the batch instead of the weights, which
    does not fit on a chip. So a block's weights are constrained to be whole inside it (and inside
    jax.checkpoint), and the activations at its border to lie as the batch does.

    Args:
      remat: a key of REMAT.
      dtype: of activations, in which weights are gathered.
    """
    batch, gather = batch_sharding(mesh), gatherer(mesh, dtype)
    split = mesh.shape["fsdp"] * mesh.shape["tensor"] > 1

    def on_batch(x):  # everything but the dropout key, a scalar, has the batch first
        return jax.lax.with_sharding_constraint(x, batch) if x.ndim else x

    def gathered(fn, params, *arrays):
        if split:
            params = jax.tree.map(gather, params)
            arrays = jax.tree.map(on_batch, arrays)
        return fn(params, *arrays)

    def run(fn, params, *arrays):
        if remat == "none":  # else jax.checkpoint rounds all that is kept, one pass over it more
            return gathered(fn, params, *arrays)
        # Barriers keep XLA from undoing the recomputation of products. Where those are kept, they
        # would only have it store, in float32, what it can compute from its neighbour on the way.
        step = jax.checkpoint(
            gathered,
            static_argnums=(0,),
            policy=REMAT[remat],
            prevent_cse=remat != "save_products",
        )
        return step(fn, params, *arrays)

    return run
