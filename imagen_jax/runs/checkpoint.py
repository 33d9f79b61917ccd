"""Orbax checkpoints of the training state together with the position in the data."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers as policies

from imagen_jax.common import buckets
from imagen_jax.common.cli import log
from imagen_jax.common.errors import DAMAGED, WORKDIR_FAILED, RunError, UserError, first_line
from imagen_jax.devices import processes
from imagen_jax.runs import checksums, exported
from imagen_jax.runs.workdir import CHECKPOINTS, DAMAGED_CHECKPOINTS, check_run
from imagen_jax.sections import CheckpointConfig

# Orbax also logs each failure, up to five times with a stack trace; `Checkpoints` reports it once.
logging.getLogger("absl").addFilter(
    lambda record: not (record.exc_info and "orbax" in record.pathname)
)


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint appears only once it is complete, with the checksums of its files: Orbax writes a
    temporary folder and renames it; in a bucket, it writes COMMITTED last. Every checkpoint is
    compared with its checksums before it is read.

    Attributes:
      directory: the folder of the workdir that has the checkpoints.
      damaged: steps of the newer checkpoints that `newest_whole` has passed over.
      scores: scores of checkpoints by step, the lowest being the best; the caller fills it.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        config: CheckpointConfig | None = None,
        folder: str = CHECKPOINTS,
    ):
        """Opens the checkpoints of a workdir.

        Args:
          config: the section `checkpoint`; None opens them for reading only, which changes nothing
            on disk. Otherwise removes what an interrupted save has left.
          folder: folder in the workdir.
        """
        self._writes, self._config = config is not None, config or CheckpointConfig()
        self.directory = epath.Path(buckets.to_path(workdir, absolute=True)) / folder
        self.damaged: list[int] = []
        self.scores: dict[int, float] = {}
        self._whole: set[int] = set()
        self._saved: int | None = None
        self._saving = False

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        """Orbax's manager, made after damaged checkpoints are set aside: it may fail on them."""
        kept: list[policies.PreservationPolicy] = [policies.LatestN(self._config.max_to_keep)]
        if self._config.keep_every:
            kept.append(policies.EveryNSteps(self._config.keep_every))
        if self._config.keep_best:
            kept.append(_Best(self._config.keep_best, self))
        options = ocp.CheckpointManagerOptions(
            preservation_policy=policies.AnyPreservationPolicy(kept),
            step_prefix="step",
            create=self._writes,
            # A reader must not remove the save in progress of a run that is training.
            cleanup_tmp_directories=self._writes,
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        return ocp.CheckpointManager(self.directory, options=options)

    def _write_checksums(self) -> None:
        """Process 0 calls this when all files of a save are complete, before it is renamed."""
        folder = buckets.to_path(self.directory)
        saved = [self.path(self._saved)] if buckets.is_remote(folder) else None
        for path in saved or folder.glob("step_*.orbax-checkpoint-tmp*"):
            checksums.write(path)

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, damaged ones included, in ascending order."""
        folder = buckets.to_path(self.directory)
        names = (re.fullmatch(r"step_(\d+)", p.name) for p in folder.glob("step_*"))
        found = sorted(int(name[1]) for name in names if name)
        if buckets.is_remote(folder):
            return [step for step in found if (self.path(step) / checksums.COMMITTED).exists()]
        return found

    def path(self, step: int) -> Path:
        """Returns the folder of a checkpoint."""
        return buckets.to_path(self.directory) / f"step_{step}"

    def newest_whole(self) -> int | None:
        """Returns the step of the newest checkpoint whose files are what was saved, or None.

        A run that trains moves newer ones, which are damaged, to the folder `damaged`.

        Raises:
          RunError: there are checkpoints, but all are damaged.
        """
        found = processes.from_first(self.steps()[::-1])
        damages = []
        for step in found:
            if not (damage := self._find_damage(step)):
                return step
            damages.append(f"{self.path(step)} is damaged: {damage}")
            if step != found[-1]:
                log.warning("%s; taking the checkpoint before it", damages[-1])
                self._set_aside(step)
        if damages:
            raise RunError(
                DAMAGED,
                f"{damages[-1]}; no older checkpoint is left, so move {self.directory} away to "
                "train from the start",
            )
        return None

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which a run that resumes here writes again."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def existing_step(self, step: int | None = None) -> int:
        """Returns `step` if it has a checkpoint (default: the newest that is not damaged).

        Raises:
          UserError: there is no such checkpoint.
          RunError: it is damaged.
        """
        found = self.steps()
        if not found:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is None:
            return self.newest_whole()
        if step not in found:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; found {found}")
        if damage := self._find_damage(step):
            raise RunError(DAMAGED, f"{self.path(step)} is damaged: {damage}")
        return step

    def _find_damage(self, step: int) -> str:
        """Compares a checkpoint with its checksums; with several processes, each a part."""
        if step in self._whole:
            return ""
        try:
            damage = checksums.find_damage(
                self.path(step), jax.process_index(), jax.process_count()
            )
        except FileNotFoundError:
            log.warning("%s has no checksums, so damage would not be found", self.path(step))
            damage = ""
        damage = processes.first_text(damage)
        if not damage:
            self._whole.add(step)
        return damage

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint away: a run that trains will save this step again."""
        self.damaged.append(step)
        if self._writes and jax.process_index() == 0:
            aside = self.path(step).parent.parent / DAMAGED_CHECKPOINTS
            number = sum(1 for _ in aside.glob(f"step_{step}*"))
            to = aside / (f"step_{step}" + (f".{number}" if number else ""))
            buckets.move_folder(self.path(step), to)

    def save(self, step: int, state: Any, position: dict[str, Any], identity: dict) -> None:
        """Saves a checkpoint in the background; a second save waits for the first.

        Args:
          state: pytree of global arrays; each host writes its own shards.
          position: what else is needed to go on, in JSON: {"examples": examples consumed by all
            hosts, "window": the metrics of steps that are not logged yet}.
          identity: the config keys that the weights depend on (Config.identity); `restore` compares
            them.

        Raises:
          RunError: this save or the one before it failed.
        """
        if step == self._saved:
            return
        if self._saving:
            self.wait()  # as Orbax would, but naming the step that failed
        self._saved = step
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            position=ocp.args.JsonSave(position),
            identity=ocp.args.JsonSave(identity),
        )
        with self._reporting():
            self._manager.save(step, args=args)
        self._saving = True

    def restore(self, abstract_state: Any, identity: dict, step: int | None = None):
        """Restores (state, position) of `step` (default: the newest).

        Args:
          abstract_state: ShapeDtypeStructs with the shardings to restore to, which may differ from
            those of the saved state.
          identity: Config.identity of this run.

        Raises:
          UserError: there is no such checkpoint, or it belongs to another model.
          RunError: it is damaged.
        """
        step = self.existing_step(step)
        self._check_identity(step, identity)
        args = {"state": _restore_args(abstract_state), "position": ocp.args.JsonRestore()}
        restored = self._read(step, **args)
        self._check_complete(step, restored["state"])
        return restored["state"], restored["position"]

    def restore_ema(
        self, abstract_ema: Any, identity: dict, step: int | None = None, raw: bool = False
    ) -> Any:
        """Restores only the EMA weights of `step`; sampling does not need the rest of the state.

        Args:
          raw: restore the weights themselves instead of their EMA.

        Raises:
          UserError, RunError: as for `restore`.
        """
        step = self.existing_step(step)
        self._check_identity(step, identity)
        name = "params" if raw else "ema"
        return self.restore_part(step, {name: abstract_ema})[name]

    def restore_part(self, step: int, target: Any) -> Any:
        """Restores the arrays of the state that are in `target`, a tree of ShapeDtypeStructs."""
        restored = self._read(step, state=_restore_args(target))["state"]
        self._check_complete(step, restored)
        return restored

    def saved_shapes(self, step: int) -> Any:
        """Returns the tree of the saved state; its leaves have the attribute `shape`."""
        return (
            ocp.PyTreeCheckpointHandler().metadata(self.directory / f"step_{step}" / "state").tree
        )

    def wait(self) -> None:
        """Blocks until the save in progress is complete.

        Raises:
          RunError: it failed.
        """
        self._saving = False
        with self._reporting():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises RunError if a save in the background has failed. Does not wait."""
        if self._saving and not self._manager.is_saving_in_progress():
            self.wait()

    @contextlib.contextmanager
    def _reporting(self) -> Iterator[None]:
        """Turns what Orbax raises for a save, which differs by file system, into a RunError."""
        try:
            yield
        except Exception as e:
            code = re.search(r"os_error_code='?(\d+)", str(e))  # as TensorStore writes it
            known = os.strerror(int(code[1])) if code else getattr(e, "strerror", None)
            gone = not buckets.is_remote(self.directory) and not self.directory.exists()
            cause = known or ("it has disappeared" if gone else first_line(e))
            raise RunError(
                WORKDIR_FAILED,
                f"the checkpoint of step {self._saved} was not saved in {self.directory}: {cause}; "
                "once the folder can be written, the same command resumes from the one before it",
            ) from e

    def close(self) -> None:
        """Finishes the save in progress and stops the background threads."""
        if "_manager" in self.__dict__:
            with self._reporting():
                self._manager.close()

    def _read(self, step: int, **args: Any) -> Any:
        """Restores items. Only a checkpoint without checksums can be damaged here."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**args))
        except Exception as e:
            if (self.path(step) / checksums.CHECKSUMS).exists():
                raise
            message = f"{self.path(step)} cannot be read, and has no checksums: {first_line(e)}"
            raise RunError(DAMAGED, message) from e

    def _check_identity(self, step: int, identity: dict) -> None:
        saved = self._read(step, identity=ocp.args.JsonRestore())["identity"]
        check_identity(saved, identity, f"{self.directory} step {step}")

    def _check_complete(self, step: int, restored: Any) -> None:
        """Raises UserError for a missing array, which Orbax leaves as a ShapeDtypeStruct."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise UserError(
                    f"checkpoint {self.directory} step {step} was written by another version of "
                    f"this network: it has no {name}; train again in another --workdir"
                )


class _Best(policies.PreservationPolicy):
    """Keeps the checkpoints with the lowest scores."""

    def __init__(self, count: int, owner: Checkpoints):
        self._count, self._owner = count, owner

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        scores = self._owner.scores
        scored = [(scores[c.step], c.step) for c in checkpoints if c.step in scores]
        best = {step for _, step in sorted(scored)[: self._count]}
        return [c.step in best for c in checkpoints]


def check_identity(saved: dict, identity: dict, checkpoint: str) -> None:
    """Raises UserError if a checkpoint, saved with another identity, belongs to another model."""
    # A round trip through JSON makes tuples lists, as in the checkpoint.
    wanted = json.loads(json.dumps(identity))
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"checkpoint {checkpoint} belongs to another model: config.{key} is "
                f"{wanted.get(key)!r}, the checkpoint has {saved.get(key)!r}; restore the config, "
                "or choose another --workdir"
            )


def newest_step(workdir: epath.PathLike) -> int:
    """Returns the step of a run's newest checkpoint, or that of an exported model.

    Raises:
      UserError: the workdir has no run, or the run has no checkpoint.
    """
    check_run(workdir)  # opening the checkpoints of a missing run would create a folder
    if exported.is_exported(workdir):
        return exported.read(workdir)["step"]
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.existing_step()


def _restore_args(target: Any) -> ocp.args.PyTreeRestore:
    """Returns arguments that restore only the arrays in `target`, a tree of ShapeDtypeStructs."""
    args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(item=target, restore_args=args, partial_restore=True)
