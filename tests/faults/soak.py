"""Kills a training run at random moments, resumes it, and compares it with one left alone.

    python -m tests.faults.soak --kills=50
    python -m tests.faults.soak --kills=10 --processes=4,2,3

Both runs have the same tiny config: a mixture of two tasks, random crops, flips, caption dropout,
gradient accumulation, an EMA and averages for post-hoc EMA, and evaluations, samples and
checkpoints between the steps. Half of the kills are of runs that read from disk, half of runs that
keep their images in memory. In the end these must be equal bit for bit: weights, averages,
optimizer state, data position, samples, the metrics but for times, and every batch that was read.
A kill is SIGKILL at a random moment of the startup, or within two checkpoints of the first step, so
it also hits saves and evaluations.

With --processes, one process is killed, the others must end at once with exit code 75, and the run
goes on with the next number of processes. Then the losses must be within 1e-5 of those of a single
process, and each example must be read once in an epoch. Exit codes: 0 all is equal; 1 something
differs.
"""

from __future__ import annotations

import itertools
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .running import RECORDS, Run, make_config

TIMES = ("step_time", "images_per_s", "mfu", "data_wait", "goodput", "checkpoint_delay")


def results(run: Run) -> dict[str, Any]:
    """Returns what must be equal in two runs."""
    import jax
    import orbax.checkpoint as ocp

    from imagen_jax.runs.checkpoint import Checkpoints

    checkpoints = Checkpoints(run.workdir)
    step = checkpoints.existing_step()
    restore = {"state": ocp.args.PyTreeRestore(), "position": ocp.args.JsonRestore()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Orbax reads the shardings from the checkpoint
        found = checkpoints._read(step, **restore)
    checkpoints.close()
    leaves = jax.tree_util.tree_leaves_with_path(found["state"])
    state = {jax.tree_util.keystr(path): jax.device_get(leaf).tobytes() for path, leaf in leaves}
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in run.metrics()]
    lines = [line for line in lines if not any(k.startswith("startup/") for k in line)]
    samples = {path.name: path.read_bytes() for path in (run.workdir / "samples").iterdir()}
    snapshots = sorted(p.name for p in (run.workdir / "snapshots").glob("step_*"))
    named = {"step": step, "position": found["position"], "metrics": lines, "snapshots": snapshots}
    return {**named, **state, **samples}


def compare(killed: Run, alone: Run) -> list[str]:
    """Returns the names of what differs between two finished runs."""
    a, b = results(killed), results(alone)
    differing = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    # The last batches that were read ahead of a kill may be beyond those of the other run.
    read, expected = killed.batches(), alone.batches()
    wrong = [n for n in expected if read.get(n) != expected[n]]
    return differing + [f"batch {n}" for n in wrong]


def soak(kills: int, num_steps: int, in_memory: bool, seed: int, folder: Path) -> list[str]:
    """Runs the comparison; returns what differs. Finished runs start over until all kills are done.

    Args:
      folder: a folder for data and runs.
    """
    rng = random.Random(seed)
    kind = "memory" if in_memory else "disk"
    # Squares of random size need the image as it is stored.
    crop = {} if in_memory else {"crop": "random", "min_crop_scale": 0.8}
    config = make_config(folder, num_steps, data={"in_memory": in_memory, **crop})
    alone = Run(config, folder / f"{kind}_alone")
    begin = time.monotonic()
    alone.finish()
    total = time.monotonic() - begin
    print(f"undisturbed, from {kind}: {num_steps} steps in {total:.0f} s", flush=True)
    done, problems = 0, []
    for number in itertools.count(1):
        if done >= kills:
            return problems
        run = Run(config, folder / f"{kind}_{number}")
        while done < kills and (when := run.kill(rng, startup=total, steps=10)):
            done += 1
            print(f"kill {done} of {kills}: {when}", flush=True)
        run.finish()
        problems += [f"run {number} from {kind}: {name}" for name in compare(run, alone)]


def elastic(
    kills: int, num_steps: int, counts: Sequence[int], seed: int, folder: Path
) -> list[str]:
    """Kills one of several processes, goes on with another number; returns what is wrong.

    Args:
      counts: numbers of processes, taken in turn.
      folder: a folder for data and runs.
    """
    rng = random.Random(seed)
    changes = {"mesh": {"data": 1, "fsdp": -1}, "checkpoint": {"every_s": 0.1}}
    changes |= {"batch_size": 24, "log_every": 1, "eval_every": 0, "sample_every": 0}
    config = make_config(folder, num_steps, **changes)
    one = Run(config, folder / "one")
    begin = time.monotonic()
    one.finish()
    total = time.monotonic() - begin
    print(f"one process: {num_steps} steps in {total:.0f} s", flush=True)
    turns = itertools.cycle(counts)
    done, problems = 0, []
    for number in itertools.count(1):
        if done >= kills:
            return problems
        run = Run(config, folder / f"many_{number}")
        while done < kills and (when := run.kill(rng, total, steps=6, count=next(turns))):
            done += 1
            print(f"kill {done} of {kills}: {when}", flush=True)
        run.finish(next(turns))
        problems += [f"run {number}: {problem}" for problem in compare_losses(run, one)]
        problems += [f"run {number}: {problem}" for problem in check_examples(run)]


def compare_losses(many: Run, one: Run) -> list[str]:
    """Returns the steps whose losses differ by more than 1e-5, or are missing."""
    a, b = many.losses(), one.losses()
    near = {step for step in a.keys() & b.keys() if abs(a[step] - b[step]) <= 1e-5}
    return [
        f"step {n}: {a.get(n)} instead of {b.get(n)}" for n in sorted(a.keys() | b.keys() - near)
    ]


def check_examples(run: Run) -> list[str]:
    """Returns the epochs in which an example was not read exactly once."""
    found, problems = run.examples(), []
    last = {task: max(epoch for t, epoch in found if t == task) for task in RECORDS}
    for (task, epoch), positions in found.items():
        indices = [i for read in positions.values() for i in read]
        whole = len(indices) == RECORDS[task] or epoch == last[task]
        if not whole or len(set(indices)) != len(indices):
            problems.append(f"epoch {epoch} of {task}: {len(indices)} reads")
    return problems


def main(argv: Sequence[str]) -> None:
    """Parses the flags and exits with the result."""
    from absl import flags

    from imagen_jax.common import cli
    from imagen_jax.common.errors import UserError

    flags.DEFINE_integer("kills", 50, "Number of kills.", lower_bound=1)
    flags.DEFINE_integer("num_steps", 60, "Steps of the run.", lower_bound=1)
    flags.DEFINE_list("processes", [], "Numbers of processes that divide 24, such as 4,2,3.")
    flags.DEFINE_integer("seed", 0, "Seed of the moments.")
    flags.DEFINE_string("dir", None, "Folder of data and runs (default: temporary, then removed).")

    def run(argv: Sequence[str]) -> None:
        f = flags.FLAGS
        counts = [int(word) if word.isdigit() else 0 for word in f.processes]
        if any(count < 1 or 24 % count for count in counts):
            raise UserError(f"--processes is {','.join(f.processes)}; allowed: divisors of 24")
        folder = Path(f.dir or tempfile.mkdtemp(prefix="soak_"))
        folder.mkdir(parents=True, exist_ok=True)
        if counts:
            problems = elastic(f.kills, f.num_steps, counts, f.seed, folder)
        else:
            problems = soak(f.kills - f.kills // 2, f.num_steps, False, f.seed, folder)
            problems += soak(f.kills // 2, f.num_steps, True, f.seed + 1, folder)
        for problem in problems:
            print(f"differs: {problem}")
        print("all is equal" if not problems else f"{len(problems)} differences")
        if not problems and not f.dir:
            shutil.rmtree(folder)
        sys.exit(bool(problems))

    cli.run(run)


if __name__ == "__main__":
    main(sys.argv)
