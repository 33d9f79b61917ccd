"""Kills a training run at random moments, resumes it, and compares it with one left alone.

    python -m tests.faults.soak --kills=50

Both runs have the same tiny config: gradient accumulation, EMA, random crops, caption dropout, and
evaluations, samples and checkpoints between the steps. In the end these must be equal bit for bit:
weights, EMA, optimizer state, data position, the metrics but for times, and every batch that was
read. A kill is SIGKILL at a random moment of the startup, or within two checkpoints of the first
step, so it also hits saves and evaluations. Exit codes: 0 all is equal; 1 something differs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CONFIG = """
import json, pathlib
from ml_collections import ConfigDict

def get_config():
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""
# Environment variables: files that record the batches and the examples that were read, and seconds
# that each batch takes longer.
BATCHES, EXAMPLES, DELAY = "SOAK_BATCHES", "SOAK_EXAMPLES", "SOAK_DELAY"
TIMES = ("step_time", "images_per_s", "mfu", "data_wait", "goodput", "checkpoint_delay")


def child(argv: Sequence[str]) -> None:
    """Runs imagen_jax.train, and records every batch and every example that it takes.

    A batch by its number and a hash, an example by its epoch, its position and its index.
    """
    from data_pipelines.reading.examples import Examples
    from data_pipelines.reading.reader import Reader
    from imagen_jax import train
    from imagen_jax.common import cli
    from imagen_jax.training import goodput

    goodput.BEAT_S = 0.1  # a kill comes within seconds
    take = Reader.train_batches

    def recorded(self, position: int, *share: int) -> Iterator[dict]:
        batches = take(self, position, *share)
        with open(os.environ[BATCHES], "a") as file:
            for number, batch in enumerate(batches, start=position // self.config.batch_size):
                digest = hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch)))
                file.write(f"{number} {digest.hexdigest()}\n")
                file.flush()
                time.sleep(float(os.environ.get(DELAY, 0)))
                yield batch

    Reader.train_batches = recorded
    if path := os.environ.get(EXAMPLES):
        one = Examples.example

        def example(self, index: int, epoch: int, position: int) -> Any:
            if self.shuffle:
                with open(path, "a") as file:
                    file.write(f"{epoch} {position} {index}\n")
            return one(self, index, epoch, position)

        Examples.example = example
    sys.argv = [sys.argv[0], *argv]
    train.define_flags()
    cli.run(train.main)


def make_config(folder: Path, num_steps: int, in_memory: bool) -> Path:
    """Writes tiny data and the config of both runs; returns the config's path."""
    import conftest

    from data_pipelines.records import writing
    from data_pipelines.scenes.builder import Scenes

    counts = {"train": 40, "validation": 16, "heldout": 8}
    data = Scenes(
        data_dir=str(folder / "data"),
        resolution=32,
        counts=counts,
        seed=0,
        encoder=conftest.FakeEncoder(),
    )
    writing.prepare(data)
    values = conftest.shrink(conftest.load_config("demo", "unet")).to_dict()
    values["data"].update(dir=str(folder / "data"), build=False, in_memory=in_memory, image_size=32)
    values["model"].update(image_size=16, attention_resolutions=())
    values.update(
        num_steps=num_steps, microbatches=2, log_every=2, eval_every=5, eval_batches=1,
        sample_every=11, num_samples=2, checkpoint_every=5,
    )  # fmt: skip
    path = folder / "tiny.py"
    path.write_text(CONFIG)
    path.with_suffix(".json").write_text(json.dumps(values))
    return path


class Run:
    """A run in its own workdir.

    Attributes:
      workdir: the workdir; metrics and the records of its batches are read from there.
    """

    def __init__(self, config: Path, workdir: Path):
        self.workdir = workdir
        self._records = workdir.with_suffix(".batches")
        self._log = workdir.with_suffix(".log")
        self._command = [sys.executable, "-m", "tests.faults.soak", "--child"]
        self._command += [f"--config={config}", f"--workdir={workdir}"]
        self._env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(config.parent / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",  # one device
            BATCHES: str(self._records),
        }

    def start(self) -> subprocess.Popen:
        """Starts or resumes the run."""
        with self._log.open("a") as log:
            return subprocess.Popen(self._command, cwd=ROOT, env=self._env, stdout=log, stderr=log)

    def finish(self) -> None:
        """Trains to the end. Raises RuntimeError, with the end of the log, if this fails."""
        if code := self.start().wait():
            raise RuntimeError(f"exit code {code}: {self._log.read_text()[-2000:]}")

    def num_read(self) -> int:
        """Returns the number of batches that were read so far, repetitions included."""
        return self._records.read_bytes().count(b"\n") if self._records.exists() else 0

    def kill(self, rng: random.Random, startup: float, steps: int) -> str:
        """Starts the run and kills it at a random moment; returns when, "" if it ended before.

        Args:
          startup: seconds that a start takes.
          steps: number of steps within which to kill, if not in the startup.
        """
        process, begin = self.start(), time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.callback(process.wait)
            stack.callback(process.kill)
            if rng.random() < 0.3:
                moment, until = "startup", begin + rng.uniform(0, startup)
                while time.monotonic() < until and process.poll() is None:
                    time.sleep(0.01)
            else:
                goal = self.num_read() + rng.randint(1, steps)
                moment = f"batch {goal}"
                while self.num_read() < goal and process.poll() is None:
                    time.sleep(0.005)
                time.sleep(rng.uniform(0, 0.3))
        if process.returncode == -signal.SIGKILL:
            return f"{moment}, {time.monotonic() - begin:.1f} s after the start"
        if process.returncode:
            raise RuntimeError(f"exit code {process.returncode}: {self._log.read_text()[-2000:]}")
        return ""

    def results(self) -> dict[str, Any]:
        """Returns what must be equal in two runs."""
        import jax
        import orbax.checkpoint as ocp

        from imagen_jax.runs.checkpoint import Checkpoints

        checkpoints = Checkpoints(self.workdir)
        step = checkpoints.existing_step()
        restore = {"state": ocp.args.PyTreeRestore(), "position": ocp.args.JsonRestore()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Orbax reads the shardings from the checkpoint
            found = checkpoints._read(step, **restore)
        checkpoints.close()
        leaves = jax.tree_util.tree_leaves_with_path(found["state"])
        state = {
            jax.tree_util.keystr(path): jax.device_get(leaf).tobytes() for path, leaf in leaves
        }
        lines = [json.loads(line) for line in (self.workdir / "metrics.jsonl").open()]
        lines = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
        lines = [line for line in lines if not any(k.startswith("startup/") for k in line)]
        return {"step": step, "position": found["position"], **state, "metrics": lines}

    def batches(self) -> dict[int, set[str]]:
        """Returns the hashes that were read as each batch: one, however often it was read."""
        found: dict[int, set[str]] = {}
        for line in self._records.read_text().split("\n"):
            number, _, digest = line.partition(" ")
            if len(digest) == 64:  # a kill can cut the last line
                found.setdefault(int(number), set()).add(digest)
        return found


def compare(killed: Run, alone: Run) -> list[str]:
    """Returns the names of what differs between two finished runs."""
    a, b = killed.results(), alone.results()
    differing = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    # The last batches that were read ahead of a kill may be beyond those of the other run.
    read, expected = killed.batches(), alone.batches()
    wrong = [n for n in expected if read.get(n) != expected[n]]
    return differing + [f"batch {n}" for n in wrong]


def soak(kills: int, num_steps: int, in_memory: bool, seed: int, folder: Path) -> list[str]:
    """Runs the comparison; returns what differs. Finished runs start over until all kills are done.

    Args:
      folder: an empty folder for data and runs.
    """
    rng = random.Random(seed)
    config = make_config(folder, num_steps, in_memory)
    alone = Run(config, folder / "alone")
    begin = time.monotonic()
    alone.finish()
    total = time.monotonic() - begin
    print(f"undisturbed: {num_steps} steps in {total:.0f} s", flush=True)
    done, number, problems = 0, 0, []
    while done < kills:
        number += 1
        run = Run(config, folder / f"killed_{number}")
        while done < kills:
            when = run.kill(rng, startup=total, steps=10)
            if not when:
                break
            done += 1
            print(f"kill {done} of {kills}: {when}", flush=True)
        run.finish()
        problems += [f"run {number}: {name}" for name in compare(run, alone)]
    return problems


def main(argv: Sequence[str]) -> None:
    """Parses the flags and exits with the result."""
    from absl import flags

    from imagen_jax.common import cli

    flags.DEFINE_integer("kills", 50, "Number of kills.", lower_bound=1)
    flags.DEFINE_integer("num_steps", 60, "Steps of the run.", lower_bound=1)
    flags.DEFINE_bool("in_memory", False, "Decode all images once, and keep them in memory.")
    flags.DEFINE_integer("seed", 0, "Seed of the moments.")
    flags.DEFINE_string("dir", None, "Folder of data and runs (default: temporary, then removed).")

    def run(argv: Sequence[str]) -> None:
        f = flags.FLAGS
        folder = Path(f.dir or tempfile.mkdtemp(prefix="soak_"))
        folder.mkdir(parents=True, exist_ok=True)
        problems = soak(f.kills, f.num_steps, f.in_memory, f.seed, folder)
        for problem in problems:
            print(f"differs: {problem}")
        print("all is equal bit for bit" if not problems else f"{len(problems)} differences")
        if not problems and not f.dir:
            shutil.rmtree(folder)
        sys.exit(bool(problems))

    cli.run(run)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main(sys.argv)
