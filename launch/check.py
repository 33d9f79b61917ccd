"""Checks the input of a launch from this machine, before anything is rented.

    python -m launch.check --name=pod --zone=us-central2-b --type=v4-512 -- \\
        --config=configs/base64.py:v4-512 --workdir=/mnt/share/base64 \\
        --config.data.dir=/mnt/share/data

create.sh, start.sh and keep.sh run this first. It checks:

- --name and --zone are spelled as Cloud requires; --type is a slice that exists;
- the flags of imagen_jax.train, after --, are known and their numbers are in range;
- every key of the config, which must be a file that setup.sh copies to the workers;
- config.mesh.topology, if set, is the slice of --type;
- workdir, data.dir, data.embeddings and init.workdir are paths that all workers can share;
- the dataset fits the config, if data.dir exists on this machine too.

It cannot check that Cloud offers the type in the zone, or what the workers mount.

Prints the accelerator type and the runtime version that gcloud expects. Exit codes: 0 all checks
passed; 2 invalid input.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.devices import topologies
from launch import pop_train_args

if TYPE_CHECKING:
    from imagen_jax.config import Config

FLAGS = flags.FLAGS

ROOT = Path(__file__).parent.parent

# Flag -> what Cloud allows, as a pattern and in words.
SPELLINGS = {
    "name": (
        r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?",
        "up to 63 lowercase letters, digits and hyphens, beginning with a letter",
    ),
    "zone": (r"[a-z]+-[a-z]+\d+-[a-z][a-z0-9]*", "a zone, such as us-central2-b"),
}

# Chip -> the VM software that Google recommends for it.
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}

# The only folder of the VM that worker.sh mounts in a container.
CONTAINER_ROOT = "/mnt"


def define_flags() -> None:
    """Defines the flags when this runs as a program; importing the module must define none."""
    flags.DEFINE_string("name", "", "Name of the slice.")
    flags.DEFINE_string("zone", "", "Cloud zone, such as us-central2-b.")
    flags.DEFINE_string("type", "", "Slice to rent: v4-512, v5e-256, v5p-128, v6e-256, ...")
    flags.DEFINE_string("image", "", "Container that the workers run, if any.")


def main(train_args: Sequence[str]) -> None:
    """Runs all checks, the fast ones first, then prints the type and the runtime version."""
    for flag, (pattern, allowed) in SPELLINGS.items():
        value = FLAGS[flag].value
        if value and not re.fullmatch(pattern, value):
            raise UserError(f"--{flag} is {value!r}; allowed: {allowed}")
    topology = topologies.tpu_slice(FLAGS.type) if FLAGS.type else None
    if train_args:
        cli.log.info(check_run(train_args, topology, FLAGS.image))
    if topology:
        print(topology.name, RUNTIMES[topology.chip.name])


def check_run(train_args: Sequence[str], topology: topologies.Topology | None, image: str) -> str:
    """Checks the flags of imagen_jax.train and the config that they select.

    Args:
      train_args: the flags of imagen_jax.train.
      topology: the slice to rent; None if it is already rented.
      image: the container that the workers run; "" without one.

    Returns:
      One line that says what was checked.

    Raises:
      UserError: naming the flag or config key.
    """
    values = parse_train_args(train_args)
    if not values.config or not values.workdir:
        raise UserError("--config=FILE and --workdir=DIR are both needed after -- (see --help)")
    check_shared("--workdir", values.workdir, image)
    # Imports JAX, so it comes after the fast checks.
    from imagen_jax.common import typed_config
    from imagen_jax.config import parse
    from imagen_jax.training import profiling

    config = parse(typed_config.load(values.config, values.set))
    check_copied(values.config.partition(":")[0])
    profiling.parse_steps(values.profile_steps, config.num_steps)
    check_topology(config, topology)
    check_shared("config.data.dir", config.data.dir, image)
    for store in config.stores:
        check_shared("config.data.embeddings", store, image)
    if config.init.workdir:
        check_shared("config.init.workdir", config.init.workdir, image)
    opened = check_dataset(config)
    where = f" on {describe(topology)}" if topology else ""
    mounts = f"workers must mount {values.workdir}, {config.data.dir}"
    data = "the dataset here fits the config" if opened else "not checked: the dataset"
    return f"checked {values.config}{where}; {mounts}; {data}"


def describe(topology: topologies.Topology) -> str:
    """Returns the name and the figures that jobset.yaml needs."""
    chips, hosts = topology.num_chips, topology.num_hosts
    return f"{topology.name} ({topology.shape}, {chips} chips, {hosts} hosts)"


def parse_train_args(train_args: Sequence[str]) -> flags.FlagValues:
    """Parses the flags of imagen_jax.train except those that describe one process.

    Raises:
      UserError: an unknown flag, or a value of the wrong type or out of range.
    """
    values = flags.FlagValues()
    for name in ("config", "workdir", "profile_steps", "compilation_cache"):
        flags.DEFINE_string(name, "", "", flag_values=values)
    for name in ("join_timeout", "heartbeat_timeout"):
        flags.DEFINE_integer(name, 1, "", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("distributed", True, "", flag_values=values)
    flags.DEFINE_multi_string("set", [], "", flag_values=values)
    try:
        rest = values(["imagen_jax.train", *cli.expand_config_flags(train_args)])
    except flags.Error as e:
        raise UserError(f"after --: {' '.join(str(e).split())}") from e
    if rest[1:]:
        raise UserError(f"after --: unexpected argument {rest[1]!r}; write flags as --name=value")
    return values


def check_shared(key: str, path: str, image: str) -> None:
    """Raises UserError unless all workers can share `path`, in a container if there is one."""
    if "://" in path:
        raise UserError(
            f"{key} is {path!r}; it must be a path that all hosts share, such as a mounted bucket "
            "(docs/launch.md)"
        )
    if not path.startswith("/"):
        raise UserError(
            f"{key} is {path!r}, which is on each worker's own disk; allowed: an absolute path on "
            "storage that all workers mount, such as /mnt/share/..."
        )
    if image and not PurePosixPath(os.path.normpath(path)).is_relative_to(CONTAINER_ROOT):
        raise UserError(
            f"{key} is {path!r}; allowed with --image: a path under {CONTAINER_ROOT}, the only "
            "folder of the VM that the container sees"
        )


def check_copied(path: str) -> None:
    """Raises UserError unless setup.sh copies the config file `path`."""
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", path]
    found = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True).stdout
    if Path(path).is_absolute() or not found:
        raise UserError(
            f"--config is {path!r}; launch/setup.sh does not copy it to the workers; allowed: a "
            "file of this checkout that git does not ignore, such as configs/base64.py"
        )


def check_topology(config: Config, topology: topologies.Topology | None) -> None:
    """Raises UserError unless the config is for one slice, and for `topology` if that is known."""
    mesh = config.mesh
    if mesh.slice not in (1, -1):
        raise UserError(
            f"config.mesh.slice is {mesh.slice}; allowed: 1, because these scripts rent one slice; "
            "docs/launch.md shows several on GKE"
        )
    if not mesh.topology:
        return
    planned = topologies.lookup(mesh.topology)
    if topology and planned != topology:
        raise UserError(
            f"config.mesh.topology is {mesh.topology!r} but --type is {topology.name!r}; write "
            f"--config=FILE:{topology.name}"
        )


def check_dataset(config: Config) -> bool:
    """Checks the dataset if this machine has config.data.dir; returns whether it did."""
    if config.data.build or not Path(config.data.dir).is_dir():
        return False
    from data_pipelines.reading import check

    check.check_dataset(config)
    return True


if __name__ == "__main__":
    train_args = pop_train_args()
    define_flags()
    cli.run(lambda argv: main(train_args))
