"""A run on disk: the names of its files, and how to find a run and read its config.

This module imports JAX only when it parses a config, so a command can report a missing run at once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from etils import epath

from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_text

if TYPE_CHECKING:
    from imagen_jax.config import Config

RUNS = "runs"  # parent of the default workdirs

# Names inside a workdir. TensorBoard's event files are next to them.
CONFIG = "config.json"  # every config key, defaults included
METRICS = "metrics.jsonl"  # one JSON object per line
CHECKPOINTS = "checkpoints"  # training state and data position, by Orbax
SNAPSHOTS = "snapshots"  # averages of the weights for post-hoc EMA, by Orbax
BAD_RECORDS = "bad_records_{process}.jsonl"  # records that could not be used, with the reason
SAMPLES = "samples"  # grids sampled during training
PROFILE = "profile"  # traces of --profile_steps
EVALUATION = "evaluation"  # metrics, sample grids and the loss curve of imagen_jax.evaluate
REPORT = "report.html"  # the evaluation on one page


def write_config(workdir: epath.PathLike, config: Config) -> None:
    """Writes CONFIG, complete with every default."""
    path = epath.Path(workdir) / CONFIG
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_config(workdir: epath.PathLike) -> Config:
    """Reads the config of a run.

    Raises:
      UserError: the workdir has no run, or a key of its config is not valid.
    """
    check_run(workdir)
    from imagen_jax.config import parse

    return parse(json.loads((epath.Path(workdir) / CONFIG).read_text()))


def check_run(workdir: epath.PathLike) -> None:
    """Raises UserError if the workdir has no run."""
    if not (epath.Path(workdir) / CONFIG).exists():
        raise UserError(f"--workdir={os.fspath(workdir)} holds no run: {CONFIG} is missing")


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Reads METRICS; leaves out a last line that is cut off, and is empty without the file."""
    path = epath.Path(workdir) / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def only_run(folder: epath.PathLike = RUNS) -> epath.Path:
    """Returns and logs the only run in `folder`, the default workdir of commands that read a run.

    Raises:
      UserError: there are several runs, or none.
    """
    found = sorted(path.parent for path in epath.Path(folder).glob(f"*/{CONFIG}"))
    if len(found) == 1:
        log.info("workdir: %s, the only run (--workdir chooses another)", found[0])
        return found[0]
    if not found:
        raise UserError(
            f"--workdir is not set, and {os.fspath(folder)}/ has no run; train one with: "
            "python -m imagen_jax.train --config=configs/demo.py"
        )
    names = ", ".join(map(os.fspath, found))
    raise UserError(f"--workdir is not set, and there are several runs; choose one of: {names}")
