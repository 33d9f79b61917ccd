"""Orbax checkpoints: the training state and the position in the data, saved and restored as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from imagen_jax.common.errors import UserError
from imagen_jax.config import CheckpointConfig


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`.

    A step is visible only when it is complete: Orbax writes to a temporary name and renames.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig | None = None):
        config = config or CheckpointConfig()
        self.directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=config.max_to_keep,
            keep_period=config.keep_every or None,
            step_prefix="step",
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def existing_step(self, step: int | None = None) -> int:
        """`step`, or by default the newest.

        Raises:
          UserError: there is no such checkpoint.
        """
        found = sorted(self._manager.all_steps())
        if not found:
            raise UserError(f"no checkpoint in {self.directory}")
        if step is not None and step not in found:
            raise UserError(f"no checkpoint of step {step} in {self.directory}; found {found}")
        return found[-1] if step is None else step

    def save(self, step: int, state: Any, position: dict[str, int], identity: dict) -> None:
        """Saves in the background; a second save waits for the first.

        Args:
          state: pytree of global arrays, each host writing its own shards.
          position: where the data stream stands, see `data.Position`.
          identity: what the state belongs to, compared on restore (see `check_identity`).
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
        """Restores (state, position) of `step`, by default the newest, onto the given shardings.

        Args:
          abstract_state: ShapeDtypeStructs with shardings, which may differ from those of the save.

        Raises:
          UserError: if there is no such checkpoint, or it is one of another model.
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
        """Only the averaged weights of `step`: what sampling needs, a fraction of the state.

        Raises:
          UserError: as `restore`.
        """
        step = self.existing_step(step)
        self._check_identity(step, identity)
        args = ocp.args.Composite(state=_restore_args({"ema": abstract_ema}))
        restored = self._manager.restore(step, args=args)["state"]
        self._check_complete(step, restored)
        return restored["ema"]

    def wait(self) -> None:
        """Blocks until a save in flight is complete."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then releases the background threads."""
        self._manager.close()

    def _check_identity(self, step: int, identity: dict) -> None:
        args = ocp.args.Composite(identity=ocp.args.JsonRestore())
        saved = self._manager.restore(step, args=args)["identity"]
        # Through JSON, so that tuples and lists compare equal.
        wanted = json.loads(json.dumps(identity))
        for key in sorted(saved.keys() | wanted.keys()):
            if saved.get(key) != wanted.get(key):
                raise UserError(
                    f"checkpoint {self.directory} step {step} is of another model: config.{key} "
                    f"is {wanted.get(key)!r}, the checkpoint has {saved.get(key)!r}"
                )

    def _check_complete(self, step: int, restored: Any) -> None:
        """What a checkpoint does not have is left as it was asked for."""
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                name = jax.tree_util.keystr(path, simple=True, separator=".")
                raise UserError(
                    f"checkpoint {self.directory} step {step} was written by another version of "
                    f"this network: it has no {name}; train anew in another workdir"
                )


def _restore_args(target: Any) -> ocp.args.PyTreeRestore:
    """Reads what is in `target`, ShapeDtypeStructs with shardings, and nothing besides."""
    args = ocp.checkpoint_utils.construct_restore_args(target)
    return ocp.args.PyTreeRestore(item=target, restore_args=args, partial_restore=True)
