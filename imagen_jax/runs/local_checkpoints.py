"""Checkpoints on the local disks of the hosts, saved more often than those in the workdir.

Each process writes only the shards that its own devices hold, so a restart needs the same processes
on the same hosts. If one of them lacks its shards, all take a checkpoint of the workdir.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import socket
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from imagen_jax.common import buckets
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError, first_line
from imagen_jax.common.files import make_folder, new_folder, read_json, write_json, write_text
from imagen_jax.devices import processes
from imagen_jax.formats.tensors import read_safetensors
from imagen_jax.runs import checksums
from imagen_jax.runs.checkpoint import check_identity
from imagen_jax.runs.workdir import RUN_ID
from imagen_jax.sections import CheckpointConfig

FLAG = "config.checkpoint.local_dir"

# Checkpoints that stay while the next one is written. When a host begins to write one, the others
# have taken that step too, so each has written the one before the last.
KEPT = 2

# Files of a checkpoint, next to their checksums.
SHARDS, ABOUT = "shards.safetensors", "about.json"


class LocalCheckpoints:
    """The local checkpoints of one run; without `checkpoint.local_dir` there are none.

    They are in LOCAL_DIR/RUN/process_N/step_S_T. RUN is a hash of the run's id and workdir, so runs
    with the same local_dir never mix, nor do a workdir and its copy. T is a random number that all
    processes of one start share, so shards of different starts never mix: a host that was replaced
    may come back with old ones.

    Attributes:
      directory: the folder of this process; None if there are none.
      restored: whether this start began with a local checkpoint.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig):
        """Creates the folder if it is missing.

        Raises:
          UserError: it cannot be written.
        """
        self.directory: Path | None = None
        self.restored = False
        self._every = config.local_every
        self._pool = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._saved = 0
        self._restorable: Path | None = None
        if not config.local_dir:
            return
        (self._start,) = processes.from_first([uuid.uuid4().int % 2**31])
        process = f"process_{jax.process_index()}"
        self.directory = Path(config.local_dir).absolute() / _run(workdir) / process
        make_folder(self.directory, FLAG)

    def due(self, step: int) -> bool:
        """Returns whether the interval ends with this step."""
        return bool(self.directory) and step % self._every == 0

    def save(self, step: int, state: Any, position: dict[str, Any], identity: dict) -> None:
        """Copies this process's shards to the host, then writes them in the background.

        Waits for the save before it. A failure costs only this checkpoint and is logged.

        Args: as for Checkpoints.save.
        """
        self.wait()
        shards = {}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            for shard in leaf.addressable_shards:
                shards.setdefault(_name(path, shard.index, leaf.shape), shard.data)
        # Copies: the next step reuses the buffers, and safetensors needs rows in order.
        arrays = {k: np.array(v, order="C") for k, v in jax.device_get(shards).items()}
        about = {"position": position, "identity": identity}
        self._saved, self._pending = step, self._pool.submit(self._write, step, arrays, about)

    def _write(self, step: int, arrays: dict[str, np.ndarray], about: dict[str, Any]) -> None:
        for old in self._copies()[:-KEPT]:
            shutil.rmtree(self._path(*old))
        with new_folder(self._path(step, self._start), FLAG) as folder:
            safetensors.numpy.save_file(arrays, folder / SHARDS)
            write_json(folder / ABOUT, about)
            checksums.write(folder)

    def wait(self) -> None:
        """Blocks until the save in progress is complete; logs why if it failed."""
        pending, self._pending = self._pending, None
        try:
            if pending:
                pending.result()
        except (UserError, OSError, safetensors.SafetensorError) as e:
            log.warning("step %d  no local checkpoint: %s", self._saved, first_line(e))

    def newest_whole(self, abstract_state: Any, steps: range) -> int | None:
        """Returns the newest of the steps that every process can restore, or None.

        Args:
          abstract_state: as for `restore`; a checkpoint of other shards does not count.
          steps: process 0's count.
        """
        if not self.directory:
            return None
        copies = [copy for copy in self._copies()[::-1] if copy[0] in steps]
        numbers = processes.from_first([number for copy in copies for number in copy])
        for step, start in zip(numbers[::2], numbers[1::2], strict=True):
            folder = self._path(step, start)
            if not (damage := processes.first_text(self._find_damage(folder, abstract_state))):
                self._restorable = folder
                return step
            log.warning("local checkpoint of step %d left out: %s", step, damage)
        return None

    def _find_damage(self, folder: Path, abstract_state: Any) -> str:
        """Returns "" if this process can restore a checkpoint, else why not, and who it is."""
        try:
            damage = checksums.find_damage(folder) if folder.is_dir() else "it is missing"
            if not damage and _needed(abstract_state) - read_safetensors(folder / SHARDS).keys():
                damage = "it has the shards of another mesh"
        except UserError as e:
            damage = str(e)
        except OSError as e:
            damage = f"{checksums.CHECKSUMS} cannot be read ({e.strerror})"
        return damage and f"{damage} (process {jax.process_index()} on {socket.gethostname()})"

    def restore(self, abstract_state: Any, identity: dict, step: int) -> tuple[Any, dict]:
        """Restores (state, position) of the step that `newest_whole` has returned.

        Args:
          abstract_state: ShapeDtypeStructs with the shardings that the state was saved with.
          identity: Config.identity of this run.

        Raises:
          UserError: the checkpoint belongs to another model.
        """
        folder = self._restorable
        about = read_json(folder / ABOUT)
        check_identity(about["identity"], identity, f"{folder.parent} step {step}")
        stored = read_safetensors(folder / SHARDS)

        def put(path: Sequence[Any], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                whole = (slice(None),) * len(leaf.shape)
                found = stored[_name(path, index, leaf.shape)].read(whole)
                return found.astype(leaf.dtype, copy=False)

            return jax.make_array_from_callback(leaf.shape, leaf.sharding, part)

        self.restored = True
        return jax.tree_util.tree_map_with_path(put, abstract_state), about["position"]

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, and what interrupted saves have left."""
        self.wait()
        kept = {self._path(*copy) for copy in self._copies() if copy[0] <= step}
        for path in self._entries() - kept:
            shutil.rmtree(path, ignore_errors=True)

    def remove(self) -> None:
        """Deletes all local checkpoints: a run that has finished needs none."""
        self.wait()
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
            with contextlib.suppress(OSError):  # other processes on this host are not done yet
                self.directory.parent.rmdir()

    def close(self) -> None:
        """Finishes the save in progress and stops the background thread."""
        self.wait()
        self._pool.shutdown()

    def _entries(self) -> set[Path]:
        return set(self.directory.iterdir()) if self.directory else set()

    def _copies(self) -> list[tuple[int, int]]:
        """Returns (step, number of the start) of every checkpoint here, in ascending order."""
        found = (re.fullmatch(r"step_(\d+)_(\d+)", path.name) for path in self._entries())
        return sorted((int(name[1]), int(name[2])) for name in found if name)

    def _path(self, step: int, start: int) -> Path:
        return self.directory / f"step_{step}_{start}"


def _run(workdir: Path) -> str:
    """Returns the name of a run's folders, the same in every process; makes its id if missing."""
    name, path = "", workdir / RUN_ID
    if jax.process_index() == 0:
        with buckets.as_os_errors(path):
            if not path.exists():
                write_text(path, uuid.uuid4().hex + "\n")
            name = hashlib.sha256(f"{workdir}\n".encode() + path.read_bytes()).hexdigest()[:16]
    return processes.first_text(name)


def _name(path: Sequence[Any], index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Returns the name of a shard, such as params.head.kernel[0:64,128:256]."""
    ranges = (s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
    part = ",".join(f"{first}:{end}" for first, end in ranges)
    return f"{jax.tree_util.keystr(path, simple=True, separator='.')}[{part}]"


def _needed(abstract_state: Any) -> set[str]:
    """Returns the names of the shards that the devices of this process hold."""
    return {
        _name(path, index, leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(abstract_state)
        for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    }
