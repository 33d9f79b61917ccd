"""Accelerators by their names in the clouds: figures of each, and devices to compile for.

The TPU figures come from Google's pages cloud.google.com/tpu/docs/v4, v5e, v5p and v6e, with three
exceptions:

- Memory is what libtpu's compiler lets a program use.
- The clock is peak_flops divided by the operations of the matrix units in one cycle.
- The pages say little about bandwidth out of a slice. The shares of the data center's network and
  of PCIe are the estimates of jax-ml.github.io/scaling-book/tpus: 25 GB/s per host and 15 GB/s per
  chip (v6e: twice both). They agree with the pages where those give a figure (v5e 6.4 and v6e 25.6
  Tbit/s for 256 chips).
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
    """Figures of one accelerator.

    The bandwidths of link, network and host are per direction.

    Attributes:
      name: common name, such as "v4".
      hbm_bytes: memory a program can use; 0 for a CPU, which uses the machine's memory.
      peak_flops: dense bf16 FLOP/s; 0 if unknown, and then all estimates of time are unknown.
      hbm_bytes_per_s: bandwidth of that memory, reads and writes together.
      link_bytes_per_s: bandwidth of one interconnect link.
      network_bytes_per_s: the chip's share of its host's bandwidth to other slices.
      host_bytes_per_s: bandwidth between the chip and its host's memory.
      clock_hz: clock of the cycles in which the compiler estimates time.
      cores: what one chip adds to the number in a slice's name. Cloud counts TensorCores for v4
        and v5p, chips for v5e and v6e.
      libtpu: the compiler's name for the chip; "" if libtpu does not compile for it.
      config: the compiler's configuration; "megacore" makes one device of two cores.
      torus: a side that is a multiple of this is a ring (in 3D only if all sides are), else a line.
      kinds: values of jax.Device.device_kind for this chip.
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
        link_bytes_per_s=50e9,  # 400 GB/s over 4 links, both directions together
        network_bytes_per_s=3.125e9,  # 8 chips per host
        host_bytes_per_s=15e9,
        clock_hz=1.5e9,
        libtpu="v5e",
        torus=16,
        kinds=("TPU v5 lite", "TPU v5e"),
    ),
    "v5p": Chip(
        "v5p",
        hbm_bytes=int(95.74 * GIB),  # of 95 GB according to the page
        peak_flops=459e12,
        hbm_bytes_per_s=2765e9,
        link_bytes_per_s=100e9,  # 1200 GB/s over 6 links, both directions together
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
        link_bytes_per_s=100e9,  # 800 GB/s over 4 links, both directions together
        network_bytes_per_s=12.5e9,
        host_bytes_per_s=32e9,
        clock_hz=1.75e9,
        libtpu="v6e",
        torus=16,
        kinds=("TPU v6 lite", "TPU v6e"),
    ),
    # From NVIDIA's data sheet of the H100 SXM. The H200 differs only in memory: 141 GB, 4.8 TB/s.
    "gpu": Chip(
        "gpu",
        hbm_bytes=int(80e9),
        peak_flops=989e12,
        hbm_bytes_per_s=3.35e12,
        kinds=("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
    ),
    # Not a topology to plan for; its peak gives the MFU of runs on it.
    "a100": Chip(
        "a100", peak_flops=312e12, kinds=("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB")
    ),
    "cpu": Chip("cpu"),
}

# Number of chips -> sides. Cloud offers more shapes; these are the defaults for a name.
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
# Cloud's name of a slice without its number -> chip and shapes.
FAMILIES = {
    "v4": (CHIPS["v4"], SHAPES_3D),
    "v5litepod": (CHIPS["v5e"], SHAPES_2D),
    "v5p": (CHIPS["v5p"], SHAPES_3D),
    "v6e": (CHIPS["v6e"], SHAPES_2D),
}
ALIASES = {"v5e": "v5litepod"}


@dataclasses.dataclass(frozen=True)
class Topology:
    """One or more equal slices of a TPU pod, or one CPU or GPU.

    Attributes:
      name: name of one slice as Cloud writes it, such as "v4-512".
      chip: figures of one chip.
      sides: shape of one slice in chips.
      slices: number of slices, connected by the data center's network.
    """

    name: str
    chip: Chip
    sides: tuple[int, ...] = (1,)
    slices: int = 1

    @property
    def label(self) -> str:
        """Name and number of slices, such as "2 x v4-512"."""
        return self.name if self.slices == 1 else f"{self.slices} x {self.name}"

    @property
    def slice_chips(self) -> int:
        """Number of chips in one slice."""
        return math.prod(self.sides)

    @property
    def num_chips(self) -> int:
        """Number of chips in all slices; each is one JAX device."""
        return self.slices * self.slice_chips

    @property
    def shape(self) -> str:
        """Shape of a slice as Cloud writes it, such as "4x8x8"."""
        return "x".join(map(str, self.sides))

    @property
    def host_bounds(self) -> tuple[int, int, int]:
        """Shape of one host's chips: 2x2, or a whole two-dimensional slice of up to 8 chips."""
        if len(self.sides) < 3 and self.slice_chips <= 8:
            return (*self.sides, 1, 1)[:3]
        return (2, 2, 1)

    @property
    def num_hosts(self) -> int:
        """Number of hosts in all slices; each is one JAX process."""
        return self.num_chips // math.prod(self.host_bounds)

    @property
    def links(self) -> int:
        """Interconnect links that every chip of a slice has.

        A side that is a ring gives every chip two links, a line at least one (at its ends), and a
        side of one chip none. A three-dimensional slice has rings if all its sides are multiples of
        4, a two-dimensional one along sides of 16.
        """
        unit = self.chip.torus
        rings = [side % unit == 0 for side in self.sides]
        if len(self.sides) == 3:
            rings = [all(rings)] * 3
        return sum(0 if n == 1 else 1 + r for n, r in zip(self.sides, rings, strict=True))

    @property
    def ici_bytes_per_s(self) -> float:
        """Bytes per second every chip can receive from its neighbors while sending as many."""
        return self.links * self.chip.link_bytes_per_s


def lookup(name: str, slices: int = 1) -> Topology:
    """Returns the topology of a name such as v4-512, v5litepod-16 (or v5e-16), cpu or gpu.

    Args:
      name: for v4 and v5p the number counts cores, two per chip: v4-512 has 256 chips.
      slices: number of slices, connected by the data center's network.

    Raises:
      UserError: the name is unknown, or `slices` is above 1 for a CPU or GPU.
    """
    if name in ("cpu", "gpu"):
        if slices > 1:
            raise UserError(f"config.mesh.slice is {slices}; allowed on {name}: 1")
        return Topology(name, CHIPS[name])
    return tpu_slice(name, slices, "config.mesh.topology", also=("cpu", "gpu"))


def tpu_slice(
    name: str, slices: int = 1, key: str = "--type", also: tuple[str, ...] = ()
) -> Topology:
    """Returns the topology of a TPU slice.

    Args:
      key: the flag or config key, for error messages.
      also: further names that the key allows, for error messages.

    Raises:
      UserError: Cloud has no such slice; the message lists the names it has.
    """
    family, _, number = name.rpartition("-")
    family = ALIASES.get(family, family)
    chip, shapes = FAMILIES.get(family, (None, {}))
    if chip and number.isdecimal():
        chips, rest = divmod(int(number), chip.cores)
        if chips in shapes and not rest:
            return Topology(f"{family}-{int(number)}", chip, shapes[chips], slices)
    if chip:
        allowed = ", ".join(f"{family}-{n * chip.cores}" for n in shapes)
    else:
        families = [f"{f}-N" for f in sorted({*FAMILIES, *ALIASES})]
        allowed = f"{', '.join([*families, *also])} (for example v4-512, v5e-256)"
    raise UserError(f"{key} is {name!r}; allowed: {allowed}")


def devices(topology: Topology) -> list[Any]:
    """Returns devices to compile for that need not exist here; for cpu and gpu, one CPU device.

    Raises:
      UserError: libtpu, the TPU compiler, is not installed.
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
    # Keeps libtpu from looking for a TPU VM, and lets other processes use libtpu meanwhile.
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
    """Returns the peak bf16 FLOP/s of this machine's first device; 0 if unknown, as for a CPU."""
    import jax

    kind = jax.devices()[0].device_kind
    return next((chip.peak_flops for chip in CHIPS.values() if kind in chip.kinds), 0.0)
