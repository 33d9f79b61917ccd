"""A run on disk: the names of its files, and how to find a run and read its config.

This module imports JAX only when it parses a config, so a command can report a missing run at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etils import epath

from imagen_jax.common import buckets
from imagen_jax.common.cli import log
from imagen_jax.common.errors import WORKDIR_FAILED, RunError, UserError
from imagen_jax.common.files import read_json, write_text
from imagen_jax.runs.ownership import owned

if TYPE_CHECKING:
    from imagen_jax.config import Config

# What the system reports about a disk or a share rather than about one file.
STORAGE_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.EFBIG),
    *(errno.ENOTCONN, errno.EMFILE, errno.ENFILE),
)
RESUMES = "once it can be written, the same command resumes from the last checkpoint"

RUNS = "runs"  # parent of the default workdirs

# Names inside a workdir. TensorBoard's event files are next to them.
CONFIG = "config.json"  # every config key, defaults included
LOCK = ".lock"  # held by the process that trains
STARTS = "starts.jsonl"  # versions, commit, devices and config of every start
STATE = "state.json"  # whether the run is running or how it ended, by process 0
GOODPUT = "goodput.json"  # where the wall time goes, over all starts
METRICS = "metrics.jsonl"  # one JSON object per line
RUN_ID = "run_id"  # what names this run on the local disks of its hosts
CHECKPOINTS = "checkpoints"  # training state and data position, by Orbax
SNAPSHOTS = "snapshots"  # averages of the weights for post-hoc EMA, by Orbax
BAD_RECORDS = "bad_records_{process}.jsonl"  # records that could not be used, with the reason
DAMAGED_CHECKPOINTS = "damaged"  # checkpoints that differed from their checksums
SAMPLES = "samples"  # grids sampled during training
PROFILE = "profile"  # traces of --profile_steps
EVALUATION = "evaluation"  # metrics, sample grids and the loss curve of imagen_jax.evaluate
REPORT = "report.html"  # the evaluation on one page

# Names inside an exported model, whose config is named as that of a run; see exported.py.
EXPORT = "export.json"  # what the weights are
TENSORS = "model.safetensors"  # the weights
PARAMS = "params"  # the weights in the format orbax
CARD = "README.md"  # the model card
CASCADE = "cascade.json"  # names the folders of the stages of an exported cascade


@contextlib.contextmanager
def reporting_failures(workdir: Path) -> Iterator[None]:
    """Turns a failure to read or write the workdir into a RunError: a full disk, a lost mount."""
    try:
        yield
    except OSError as e:
        inside = e.filename and Path(os.fsdecode(e.filename)).is_relative_to(workdir)
        if not inside and e.errno not in STORAGE_ERRORS:
            raise
        raise RunError(WORKDIR_FAILED, f"{e.filename or workdir}: {e.strerror}; {RESUMES}") from e


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Keeps a second run out of a workdir, from other hosts too if the share has locks, like NFS.

    The system releases the lock of a process that dies. For a bucket, see runs.ownership.

    Raises:
      UserError: another process trains in this workdir.
    """
    if buckets.is_remote(workdir):
        with owned(workdir / LOCK):
            yield
        return
    with (workdir / LOCK).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            file.seek(0)
            holder = file.read(200).strip() or "another process"
            raise UserError(
                f"--workdir={workdir} is in use by {holder}; stop it, or choose another workdir"
            ) from e
        except OSError as e:
            log.warning("%s: this storage has no locks (%s)", workdir, e.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def check_present(path: Path) -> None:
    """Raises RunError if the workdir of a run that trains, or a file in it, has disappeared."""
    with buckets.as_os_errors(path):
        exists = path.exists()
    if not exists:
        message = f"{path} has disappeared: the workdir was removed or unmounted"
        raise RunError(WORKDIR_FAILED, f"{message}; {RESUMES}")


def write_config(workdir: epath.PathLike, config: Config) -> None:
    """Writes CONFIG, complete with every default."""
    path = epath.Path(workdir) / CONFIG
    write_text(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def read_config(workdir: epath.PathLike) -> Config:
    """Reads the config of a run or of an exported model.

    Raises:
      UserError: the workdir has no run, its config cannot be read, or a key is not valid.
    """
    check_run(workdir)
    if _has(workdir, CASCADE):
        stages = ", ".join(map(os.fspath, stages_of([workdir])))
        raise UserError(f"--workdir={os.fspath(workdir)} is a cascade; choose one of: {stages}")
    from imagen_jax.config import parse

    return parse(read_json(epath.Path(workdir) / CONFIG))


def _has(workdir: epath.PathLike, name: str) -> bool:
    """Returns whether the workdir has a file.

    Raises:
      UserError: the workdir is in a bucket that cannot be read, or not in Google Cloud Storage.
    """
    scheme, separator, _ = os.fspath(workdir).partition("://")
    if separator and scheme != "gs":
        raise UserError(
            f"--workdir is {os.fspath(workdir)!r}; it must be a folder, which may be on a mount, "
            "or gs://BUCKET/FOLDER (docs/launch.md)"
        )
    try:
        with buckets.as_os_errors(workdir):
            return (buckets.to_path(workdir) / name).exists()
    except OSError as e:
        raise UserError(f"--workdir={os.fspath(workdir)} cannot be read: {e.strerror}") from e


def check_run(workdir: epath.PathLike) -> None:
    """Raises UserError if the workdir has no run and no exported model."""
    for folder in stages_of([workdir]):
        if not _has(folder, CONFIG):
            raise UserError(f"--workdir={os.fspath(folder)} holds no run: {CONFIG} is missing")


def stages_of(workdirs: Iterable[epath.PathLike]) -> list[epath.PathLike]:
    """Replaces each folder of an exported cascade by the folders of its stages, in order.

    Raises:
      UserError: CASCADE cannot be read, or names no folders.
    """
    found: list[epath.PathLike] = []
    for workdir in workdirs:
        path = epath.Path(workdir) / CASCADE
        if not _has(workdir, CASCADE):
            found.append(workdir)
            continue
        names = read_json(path).get("stages")
        listed = isinstance(names, list) and bool(names)
        if not listed or not all(isinstance(n, str) and _is_name(n) for n in names):
            raise UserError(f"{path}: stages is {names!r}; it must list folders beside this file")
        found += [type(path)(workdir) / name for name in names]
    return found


def _is_name(text: str) -> bool:
    return text == Path(text).name and text not in ("", "..")


def check_trainable(workdir: Path) -> None:
    """Raises UserError if the workdir is an exported model, which has no training state."""
    if any(_has(workdir, name) for name in (EXPORT, CASCADE)):
        raise UserError(
            f"--workdir={workdir} is an exported model, which cannot be trained further; train in "
            "another folder"
        )


def read_metrics(workdir: epath.PathLike) -> list[dict[str, Any]]:
    """Reads METRICS; is empty without the file.

    Leaves out a last line that is cut off, and reports and leaves out damaged lines: a crash of the
    machine can leave half a line, or zeros.
    """
    path = epath.Path(workdir) / METRICS
    lines, damaged = parse_metrics(path.read_bytes() if path.exists() else b"")
    if damaged:
        log.warning(
            "%s: left out %d damaged line(s), the first is line %d",
            path, len(damaged), damaged[0],
        )  # fmt: skip
    return lines


def parse_metrics(text: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """Returns the lines of METRICS, and the numbers, from 1, of those that are damaged."""
    good, damaged = [], []
    for number, line in enumerate(text.split(b"\n")[:-1], start=1):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        if isinstance(fields, dict) and type(fields.get("step")) is int:
            good.append(fields)
        else:
            damaged.append(number)
    return good, damaged


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
