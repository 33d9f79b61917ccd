"""The files of a run: their names, and the config and checkpoints it can be opened by."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_text
from imagen_jax.config import Config, parse
from imagen_jax.runs.checkpoint import Checkpoints


def write_config(workdir: Path, config: Config) -> None:
    """Writes config.json, complete with every default."""
    write_text(workdir / "config.json", json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_config(workdir: str | Path) -> Config:
    """The config of a run.

    Raises:
      UserError: the workdir holds no run.
    """
    path = Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"--workdir={workdir} holds no run: {path.name} is missing")
    return parse(json.loads(path.read_text()))


def newest_step(workdir: str | Path) -> int:
    """The step of a run's newest checkpoint.

    Raises:
      UserError: the workdir holds no run, or the run has no checkpoint.
    """
    read_config(workdir)  # opening the checkpoints of a run that is not there would make a folder
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.existing_step()
