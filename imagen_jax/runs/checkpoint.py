"""Orbax checkpoints of the training state together with the position in the data."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from imagen_jax.common.errors import UserError
from imagen_jax.config import CheckpointConfig
from imagen_jax.runs.workdir import CHECKPOINTS, check_run


class Checkpoints:
    """The checkpoints of one run.

    A checkpoint appears only once it is complete: Orbax writes a temporary folder and renames it.

    Attributes:
      directory: the folder of the workdir.
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
        writes, config = config is not None, config or CheckpointConfig()
        self.directory = epath.Path(workdir).absolute() / folder
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.max_to_keep,
            keep_period=config.keep_every or None,
            step_prefix="step",
            create=writes,
            # A reader must not remove the save in progress of a run that is training.
            cleanup_tmp_directories=writes,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """Returns the step of the newest checkpoint, or None."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def discard_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, which a run that resumes here writes again."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def existing_step(self, step: int | None = None) -> int:
        """Returns `step` if it has a checkpoint (default: the newest step).

        Raises:
          UserError: there is no such checkpoint.
        """
        found = self.steps()
        if not found:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is not None and step not in found:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; found {found}")
        return found[-1] if step is None else step

    def save(self, step: int, state: Any, position: dict[str, int], identity: dict) -> None:
        """Saves a checkpoint in the background; a second save waits for the first.

        Args:
          state: pytree of global arrays; each host writes its own shards.
          position: the position in the data, {"examples": examples consumed by all hosts}.
          identity: the config keys that the weights depend on (Config.identity); `restore` compares
            them.
        """
        if step == self.latest_step():
            return
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            position=ocp.args.JsonSave(position),
            identity=ocp.args.JsonSave(identity),
        )
        self._manager.save(step, args=args)

    def restore(self, abstract_state: Any, identity: dict, step: int | None = None):
        """Restores (state, position) of `step` (default: the newest).

        Args:
          abstract_state: ShapeDtypeStructs with the shardings to restore to, which may differ from
            those of the saved state.
          identity: Config.identity of this run.

        Raises:
          UserError: there is no such checkpoint, or it belongs to another model.
        """
        step = self.existing_step(step)
        self._check_identity(step, identity)
        args = ocp.args.Composite(
            state=_restore_args(abstract_state), position=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        self._check_complete(step, restored["state"])
        return restored["state"], restored["position"]

    def restore_ema(self, abstract_ema: Any, identity: dict, step: int | None = None) -> Any:
        """Restores only the EMA weights of `step`; sampling does not need the rest of the state.

        Raises:
          UserError: as for `restore`.
        """
        step = self.existing_step(step)
        self._check_identity(step, identity)
        args = ocp.args.Composite(state=_restore_args({"ema": abstract_ema}))
        restored = self._manager.restore(step, args=args)["state"]
        self._check_complete(step, restored)
        return restored["ema"]

    def wait(self) -> None:
        """Blocks until the save in progress is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Finishes the save in progress and stops the background threads."""
        self._manager.close()

    def _check_identity(self, step: int, identity: dict) -> None:
        args = ocp.args.Composite(identity=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=args)["identity"]
        # A round trip through JSON makes tuples lists, as in the checkpoint.
        wanted = json.loads(json.dumps(identity))
        for key in sorted(saved.keys() | wanted.keys()):
            if saved.get(key) != wanted.get(key):
                raise UserError(
                    f"checkpoint {self.directory} step {step} belongs to another model: "
                    f"config.{key} is {wanted.get(key)!r}, the checkpoint has "
                    f"{saved.get(key)!r}; restore the config, or choose another --workdir"
                )

    def _check_complete(self, step: int, restored: Any) -> None:
        """Raises UserError for a missing array, which Orbax leaves as a ShapeDtypeStruct."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise UserError(
                    f"checkpoint {self.directory} step {step} was written by another version of "
                    f"this network: it has no {name}; train again in another --workdir"
                )


def newest_step(workdir: epath.PathLike) -> int:
    """Returns the step of a run's newest checkpoint.

    Raises:
      UserError: the workdir has no run, or the run has no checkpoint.
    """
    check_run(workdir)  # opening the checkpoints of a missing run would create a folder
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.existing_step()


def _restore_args(target: Any) -> ocp.args.PyTreeRestore:
    """Returns arguments that restore only the arrays in `target`, a tree of ShapeDtypeStructs."""
    args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(item=target, restore_args=args, partial_restore=True)
