"""Shows a run from any host that sees its workdir: step, rate, checkpoint, TensorBoard command.

    python -m launch.status --workdir=runs/demo
    python -m launch.status --workdir=gs://BUCKET/runs/demo

--state prints only whether it runs or how it ended.

Does not disturb the run. Needs only Python's standard library, unless the workdir is in a bucket.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# A run counts as silent if its last line of metrics is older than OVERDUE times the usual interval
# and older than PATIENCE seconds. A run uploads its metrics to a bucket once a minute.
OVERDUE, PATIENCE = 3.0, 120.0
COMMITTED = "commit_success.txt"  # ends the save of a checkpoint in a bucket


def main(argv: list[str] | None = None) -> int:
    """Prints the summary and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = fail
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--state", action="store_true")
    args = parser.parse_args(argv)
    with opened(args.workdir) as workdir:
        if not (workdir / "config.json").exists():
            fail(f"--workdir={args.workdir} has no run: config.json is missing")
        found = summary(workdir, time.time())
    if args.state:
        print(found.get("state", "not started"))
        return 0
    for name, value in found.items():
        print(f"{name:<12} {value}")
    return 0


@contextlib.contextmanager
def opened(workdir: str) -> Iterator[Path]:
    """Yields the workdir as an absolute path; a bucket that cannot be read ends the program."""
    if "://" not in workdir:
        yield Path(workdir).absolute()
        return
    if not workdir.startswith("gs://"):
        fail(f"--workdir is {workdir!r}; it must be a folder or gs://BUCKET/FOLDER")
    try:
        from imagen_jax.common import buckets
    except ImportError as e:
        fail(f"--workdir={workdir} needs this project's packages ({e}); see docs/launch.md")
    try:
        with buckets.as_os_errors(workdir):
            yield buckets.to_path(workdir)
    except ValueError as e:  # gcsfs is missing
        fail(str(e))
    except OSError as e:
        fail(f"--workdir={workdir} cannot be read: {e.strerror or e}")


def fail(message: str) -> None:
    """Prints a one-line error and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def summary(workdir: Path, now: float) -> dict[str, str]:
    """Summarizes a run as name -> value.

    Args:
      workdir: the --workdir of imagen_jax.train.
      now: seconds since the epoch.
    """
    try:
        config = json.loads((workdir / "config.json").read_bytes())
        if not has_numbers(config, "num_steps", "log_every"):
            raise ValueError("no numbers of steps")
    except (OSError, ValueError, AttributeError, RecursionError):
        fail(f"{workdir}/config.json is damaged; training writes it again when it resumes")
    lines = read_lines(workdir / "metrics.jsonl")
    steps = [line for line in lines if has_numbers(line, "step", "step_time", "images_per_s")]
    evals = [line for line in lines if has_numbers(line, "step", "eval_loss")]
    out = {"workdir": str(workdir)}
    if steps:
        age = now - modified(workdir / "metrics.jsonl")
        out |= progress(steps[-1], config, age)
    else:
        out["step"] = "none yet"
    out |= recorded(workdir / "state.json", out.get("state", ""), now)
    out |= goodput(workdir / "goodput.json")
    if evals:
        out["eval loss"] = f"{evals[-1]['eval_loss']:.4f} at step {evals[-1]['step']:,}"
    out["checkpoint"] = newest(workdir / "checkpoints", "", now)
    out["samples"] = newest(workdir / "samples", ".png", now)
    out["tensorboard"] = f"tensorboard --logdir={workdir}"
    return out


def progress(last: dict, config: dict, age: float) -> dict[str, str]:
    """Returns the rows for the newest line of metrics, `age` seconds old."""
    step, end, seconds = last["step"], config["num_steps"], last["step_time"]
    out = {"step": f"{step:,} of {end:,} ({step / end:.1%}), written {duration(age)} ago"}
    rate = f"{1 / seconds:.3g} steps/s, {last['images_per_s']:.4g} images/s"
    if has_numbers(last, "mfu"):
        rate += f", MFU {last['mfu']:.1%}"
    out["rate"] = rate
    if step >= end:
        out["state"] = "done"
    elif age > max(PATIENCE, OVERDUE * seconds * config["log_every"]):
        out["state"] = f"silent for {duration(age)}: stopped or stuck"
    else:
        out["state"] = f"running, {duration(seconds * (end - step))} left"
    out["loss"] = (
        f"{last['loss']:.4f}" if has_numbers(last, "loss") else "not finite, steps skipped"
    )
    return out


def recorded(path: Path, guess: str, now: float) -> dict[str, str]:
    """Returns the row of the state that the run itself records, with its host and heartbeat.

    Args:
      path: state.json; without it the row is what metrics.jsonl says.
      guess: the state as metrics.jsonl has it, such as "running, 3h left"; "" if unknown.
    """
    fields = read_object(path)
    try:
        state, step = str(fields["state"]), int(fields["step"])
        host, age = str(fields["host"]), int(now - float(fields["heartbeat"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return {}
    if state != "running":
        reason = " ".join(str(fields.get("reason", "")).split())
        texts = {"finished": "done", "preempted": "stopped after saving"}
        return {"state": texts.get(state, f"failed: {reason}")}
    if age > PATIENCE:
        stage = "starting, stopped or stuck" if step == 0 else "stopped or stuck"
        return {"state": f"silent for {duration(age)}: {stage} (on {host})"}
    running = guess if guess.startswith("running") else "running"
    return {"state": f"{running} (on {host})"}


def goodput(path: Path) -> dict[str, str]:
    """Returns the row of where the wall time went, over all starts."""
    fields = read_object(path)
    try:
        seconds = {str(part): float(s) for part, s in fields["seconds"].items()}
        share = seconds["steps"] / sum(seconds.values())
        starts = len(fields["starts"])
        if not all(0 <= s < 1e12 for s in seconds.values()):
            return {}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        return {}
    parts = ", ".join(f"{p.replace('_', ' ')} {duration(s)}" for p, s in seconds.items() if s >= 1)
    whole = duration(sum(seconds.values()))
    return {"goodput": f"{share:.1%} of {whole} in {starts} start(s): {parts}"}


def read_object(path: Path) -> dict:
    """Reads a JSON object; {} if there is none."""
    try:
        fields = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def read_lines(path: Path) -> list[dict]:
    """Reads the lines of metrics, without those that are damaged or half written."""
    lines = []
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(fields, dict) and type(fields.get("step")) is int:
            lines.append(fields)
    return lines


def has_numbers(line: dict, *names: str) -> bool:
    """Returns whether these metrics are positive finite numbers."""
    values = [line.get(name) for name in names]
    return all(type(value) in (int, float) and 0 < value < 1e30 for value in values)


def newest(folder: Path, suffix: str, now: float) -> str:
    """Returns the path and age of the step_N with the highest N.

    Unfinished checkpoints have longer names, so they do not match; in a bucket they lack COMMITTED.
    """
    name = re.compile(rf"step_(\d+){re.escape(suffix)}")
    found = {int(m[1]): p for p in folder.glob("*") if (m := name.fullmatch(p.name))}
    for _, path in sorted(found.items(), reverse=True):
        whole = path / COMMITTED if "://" in str(path) and not suffix else path
        if whole.exists():
            return f"{path}, {duration(now - modified(whole))} ago"
    return "none yet"


def modified(path: Path) -> float:
    """Returns when a file was written, in seconds since the epoch."""
    found = path.stat()
    return found.st_mtime if hasattr(found, "st_mtime") else found.mtime  # etils has no st_mtime


def duration(seconds: float) -> str:
    """Formats seconds as 3d04h, 1h02m, 3m05s or 12s."""
    minutes, s = divmod(max(0, int(seconds)), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d{h:02d}h"
    if hours:
        return f"{hours}h{m:02d}m"
    return f"{m}m{s:02d}s" if m else f"{s}s"


if __name__ == "__main__":
    sys.exit(main())
