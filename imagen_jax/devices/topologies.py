"""Accelerators by the names that clouds sell them under: their figures, and devices to compile for.

Figures of TPUs are those of Google's pages cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, except
the memory, which is what libtpu's compiler lets a program use of it, and the clock: peak_flops over
what the matrix units do in a cycle. Those pages say little of what leads out of a slice: the shares
of the data center's network and of PCIe are estimates of jax-ml.github.io/scaling-book/tpus, 25
GB/s a host and 15 GB/s a chip (v6e: twice that), and agree with the pages where they say something
(v5e 6.4, v6e 25.6 Tbit/s for 256 chips).
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from typing import Any

from imagen_jax.common.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one accelerator can do.

    Attributes:
      name: as people write it, "v4".
      hbm_bytes: memory that a program can use; 0 if that is the machine's, not the chip's.
      peak_flops: dense bf16 FLOP/s; 0 if unknown, and then so is everything that takes time.
      hbm_bytes_per_s: from and to that memory.
      link_bytes_per_s: of one interconnect link, in one direction.
      network_bytes_per_s: the chip's share of its host's way to other slices, in one direction.
      host_bytes_per_s: between the chip and its host's memory, in one direction.
      clock_hz: of the cycles in which the compiler estimates time.
      cores: by which Cloud counts in the name of a slice: TensorCores for v4 and v5p.
      libtpu: the compiler's name; "" if it has none.
      config: how libtpu presents the chip: with "megacore" two cores are one device.
      torus: sides that are multiples of it are rings, if all sides are; else lines.
      kinds: jax.Device.device_kind of it.
    """

    name: str
    hbm_bytes: int = 0
    peak_flops: float = 0.0
    hbm_bytes_per_s: float = 0.0
    link_bytes_per_s: float = 0.0
    network_bytes_per_s: float = 0.0
    host_bytes_per_s: float = 0.0
    clock_hz: float = 0.0
    cores: int = 1
    libtpu: str = ""
    config: str = "default"
    torus: int = 1
    kinds: tuple[str, ...] = ()


CHIPS = {
    "v4": Chip(
        "v4",
        hbm_bytes=int(30.75 * GIB),  # of 32 GiB
        peak_flops=275e12,
        hbm_bytes_per_s=1.2e12,
        link_bytes_per_s=50e9,  # 6 links of 50 GB/s (arXiv:2304.01433, table 4)
        network_bytes_per_s=6.25e9,
        host_bytes_per_s=15e9,
        clock_hz=1.05e9,
        cores=2,
        libtpu="v4",
        config="megacore",
        torus=4,
        kinds=("TPU v4",),
    ),
    "v5e": Chip(
        "v5e",
        hbm_bytes=int(15.75 * GIB),  # of 16 GB
        peak_flops=197e12,
        hbm_bytes_per_s=819e9,
        link_bytes_per_s=50e9,  # 400 GB/s both ways over 4 links
        network_bytes_per_s=3.125e9,  # 8 chips a host
        host_bytes_per_s=15e9,
        clock_hz=1.5e9,
        libtpu="v5e",
        torus=16,
        kinds=("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Chip(
        "v5p",
        hbm_bytes=int(95.74 * GIB),  # of 95 GB by the page
        peak_flops=459e12,
        hbm_bytes_per_s=2765e9,
        link_bytes_per_s=100e9,  # 1200 GB/s both ways over 6 links
        network_bytes_per_s=6.25e9,
        host_bytes_per_s=15e9,
        clock_hz=1.75e9,
        cores=2,
        libtpu="v5",
        config="megacore",
        torus=4,
        kinds=("TPU v5", "TPU v5p"),
    ),
    "v6e": Chip(
        "v6e",
        hbm_bytes=int(31.25 * GIB),  # of 32 GB
        peak_flops=918e12,
        hbm_bytes_per_s=1638e9,
        link_bytes_per_s=100e9,  # 800 GB/s both ways over 4 links
        network_bytes_per_s=12.5e9,
        host_bytes_per_s=32e9,
        clock_hz=1.75e9,
        libtpu="v6e",
        torus=16,
        kinds=("TPU v6 lite", "TPU v6e"),
    ),
    # NVIDIA's data sheet of the H100 SXM; the H200 differs in memory, 141 GB at 4.8 TB/s.
    "gpu": Chip(
        "gpu",
        hbm_bytes=int(80e9),
        peak_flops=989e12,
        hbm_bytes_per_s=3.35e12,
        kinds=("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    ),
    # Has no name to plan for; here for the MFU of runs on it.
    "a100": Chip(
        "a100", peak_flops=312e12, kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB")
    ),
    "cpu": Chip("cpu"),
}

# Sides by number of chips. Cloud offers more shapes; these are what a name without a shape gives.
SHAPES_3D = {
    4: (2, 2, 1),
    8: (2, 2, 2),
    16: (2, 2, 4),
    32: (2, 4, 4),
    64: (4, 4, 4),
    128: (4, 4, 8),
    256: (4, 8, 8),
    512: (8, 8, 8),
    1024: (8, 8, 16),
    2048: (8, 16, 16),
    4096: (16, 16, 16),
}
SHAPES_2D = {
    math.prod(sides): sides
    for sides in ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
}
# By what stands before the number in a name.
FAMILIES = {
    "v4": (CHIPS["v4"], SHAPES_3D),
    "v5litepod": (CHIPS["v5e"], SHAPES_2D),
    "v5e": (CHIPS["v5e"], SHAPES_2D),
    "v5p": (CHIPS["v5p"], SHAPES_3D),
    "v6e": (CHIPS["v6e"], SHAPES_2D),
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of chips, all alike, or one CPU or GPU.

    Attributes:
      name: of one slice as Cloud writes it, "v4-512".
      chip: its chips.
      sides: how those of a slice are wired, in chips; their product is their number.
      slices: how many slices, joined by the data center's network.
    """

    name: str
    chip: Chip
    sides: tuple[int, ...] = (1,)
    slices: int = 1

    @property
    def label(self) -> str:
        """The name with the number of slices, "2 x v4-512"."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def slice_chips(self) -> int:
        """Chips of one slice."""
        return math.prod(self.sides)

    @property
    def num_chips(self) -> int:
        """Chips of all slices, each one device to JAX."""
        return self.slices * self.slice_chips

    @property
    def shape(self) -> str:
        """The sides of a slice as Cloud writes them, "4x8x8"."""
        return "x".join(map(str, self.sides))

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """Sides of the part that one host has: 4 chips, but in 2D up to 8 if there is one host."""
        if len(self.sides) < 3 and self.slice_chips <= 8:
            return (*self.sides, 1, 1)[:3]
        return (2, 2, 1)

    @property
    def num_hosts(self) -> int:
        """Hosts of all slices, each one process to JAX."""
        return self.num_chips // math.prod(self.host_bounds)

    @property
    def links(self) -> int:
        """Interconnect links that every chip has: two a side that is a ring, one a line (its ends).

        Three-dimensional slices are wrapped if all sides are multiples of 4, others where a side is
        16.
        """
        unit = self.chip.torus
        rings = [side % unit == 0 for side in self.sides]
        if len(self.sides) == 3:
            rings = [all(rings)] * 3
        return sum(0 if n == 1 else 1 + r for n, r in zip(self.sides, rings, strict=True))

    @property
    def ici_bytes_per_s(self) -> float:
        """Bytes a second that every chip can receive from its neighbours while it sends as many."""
        return self.links * self.chip.link_bytes_per_s


def lookup(name: str, slices: int = 1) -> Topology:
    """The topology of a name such as v4-512 (256 chips: two cores each), v5litepod-16, cpu or gpu.

    Args:
      slices: how many of them, joined by the data center's network.

    Raises:
      UserError: for a name that is none, with those that are; for slices of what has none.
    """
    if name in ("cpu", "gpu"):
        if slices > 1:
            raise UserError(f"config.mesh.slice is {slices}; allowed on {name}: 1")
        return Topology(name, CHIPS[name])
    family, _, number = name.rpartition("-")
    chip, shapes = FAMILIES.get(family, (None, {}))
    if chip and number.isdecimal():
        chips, rest = divmod(int(number), chip.cores)
        if chips in shapes and not rest:
            return Topology(name, chip, shapes[chips], slices)
    if chip:
        allowed = ", ".join(f"{family}-{n * chip.cores}" for n in shapes)
    else:
        families = ", ".join(f"{f}-N" for f in FAMILIES)
        allowed = f"{families}, cpu, gpu (for example v4-512, v5litepod-256)"
    raise UserError(f"the topology is {name!r}; allowed: {allowed}")


def devices(topology: Topology) -> list[Any]:
    """Devices to compile for, of a machine that need not be there; one of this CPU's for cpu, gpu.

    Raises:
      UserError: if libtpu, TPUs' compiler, is not installed.
    """
    import jax
    from jax.experimental import topologies

    chip = topology.chip
    if not chip.libtpu:
        return jax.devices("cpu")[:1]
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"compiling for {topology.name} needs libtpu, which is not installed: "
            'pip install -c constraints.txt -e ".[plan]"'
        )
    # It must neither look for a TPU VM around it nor keep a second compiler from starting.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=f"{chip.libtpu}:{topology.shape}",
        chip_config_name=chip.config,
        chips_per_host_bounds=topology.host_bounds,
        num_slices=topology.slices,
    )
    return list(description.devices)


def device_peak_flops() -> float:
    """Peak bf16 FLOP/s of a device that is here; 0 where it is not known, as of a CPU."""
    import jax

    kind = jax.devices()[0].device_kind
    return next((chip.peak_flops for chip in CHIPS.values() if kind in chip.kinds), 0.0)
