"""Runs of imagen_jax.train that are killed: their data and config, and what they have read.

As a program, this is imagen_jax.train, and records every batch and every example that it takes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from imagen_jax.common.errors import BAD_INPUT, STOPPED
from launch import local

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

CONFIG = """
import json, pathlib
from ml_collections import ConfigDict
from imagen_jax.devices import sharding

assert sharding.MIN_SHARDED_SIZE
sharding.MIN_SHARDED_SIZE = 64  # so that these small weights are sharded too

def get_config():
    return ConfigDict(json.loads(pathlib.Path(__file__).with_suffix(".json").read_text()))
"""
# Environment variables: the files to record to.
BATCHES, EXAMPLES = "SOAK_BATCHES", "SOAK_EXAMPLES"
RECORDS = {"scenes_32": 40, "more": 24}  # training examples of each task
# Seconds: a process that is killed before it joins is missed only after JOIN_S, and END_S is long
# enough for the others to end on a slow machine.
JOIN_S, END_S = 240, 120


def main(argv: Sequence[str]) -> None:
    """Trains, and records batches by number and hash, examples by task, epoch, place and index."""
    from data_pipelines.reading.examples import Examples
    from data_pipelines.reading.reader import Reader
    from imagen_jax import train
    from imagen_jax.common import cli
    from imagen_jax.training import goodput

    goodput.BEAT_S = 0.1  # a kill comes within seconds
    take, one, lock = Reader.train_batches, Examples.example, threading.Lock()

    def record(variable: str, *words: Any) -> None:
        with lock, open(os.environ[variable], "a") as file:
            file.write(" ".join(map(str, words)) + "\n")

    def batches(self: Reader, position: int, *share: int) -> Iterator[dict]:
        found = take(self, position, *share)
        for number, batch in enumerate(found, start=position // self.config.batch_size):
            digest = hashlib.sha256(b"".join(batch[k].tobytes() for k in sorted(batch)))
            record(BATCHES, number, digest.hexdigest())
            yield batch

    def example(self: Examples, index: int, epoch: int, position: int) -> Any:
        if self.shuffle:
            record(EXAMPLES, self.task, epoch, position, index, "end")
        return one(self, index, epoch, position)

    Reader.train_batches, Examples.example = batches, example
    sys.argv = list(argv)
    train.define_flags()
    cli.run(train.main)


def make_config(folder: Path, num_steps: int, **changes: Any) -> Path:
    """Writes tiny data and a config; returns the config's path.

    It has a mixture of two tasks, random crops, caption dropout, gradient accumulation, an EMA,
    averages for post-hoc EMA, and evaluations, samples and checkpoints between the steps.

    Args:
      changes: to the config; sections are merged.
    """
    import conftest
    import datasets

    from data_pipelines.records import writing
    from data_pipelines.scenes.builder import Scenes

    data_dir = str(folder / "data")
    if not Path(data_dir).exists():
        counts = {"train": RECORDS["scenes_32"], "validation": 16, "heldout": 8}
        encoder = conftest.FakeEncoder()
        scenes = Scenes(data_dir=data_dir, resolution=32, counts=counts, seed=0, encoder=encoder)
        writing.prepare(scenes)
        datasets.write(data_dir, "more", [datasets.record(i) for i in range(RECORDS["more"])])
    values = conftest.shrink(conftest.load_config("demo", "unet")).to_dict()
    wanted = {
        "data": {
            "task": "mixture", "mixture": {"scenes_32": 0.7, "more": 0.3}, "dir": data_dir,
            "build": False, "image_size": 24, "flip": True,
        },
        "model": {"image_size": 16, "channel_mult": (1,), "attention_resolutions": ()},
        "ema": {"widths": (0.05, 0.1), "snapshot_every": 5},
        "num_steps": num_steps, "microbatches": 2, "log_every": 2, "checkpoint_every": 5,
        "eval_every": 5, "eval_batches": 1, "sample_every": 11, "num_samples": 2,
    }  # fmt: skip
    for key, value in changes.items():
        merged = isinstance(value, dict) and key in wanted
        wanted[key] = {**wanted[key], **value} if merged else value
    for key, value in wanted.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / f"tiny_{len(list(folder.glob('tiny_*.py')))}.py"
    path.write_text(CONFIG)
    path.with_suffix(".json").write_text(json.dumps(values))
    return path


class Run:
    """A run in its own workdir.

    Attributes:
      workdir: the workdir.
      log: file with what its processes print.
    """

    def __init__(self, config: Path, workdir: Path):
        self.workdir, self.log = workdir, workdir.with_suffix(".log")
        self._batches, self._examples = workdir.with_suffix(".batches"), workdir.with_suffix(".ids")
        self._command = [sys.executable, "-m", "tests.faults.running"]
        self._command += [f"--config={config}", f"--workdir={workdir}"]
        self._env = {
            **os.environ,
            "JAX_COMPILATION_CACHE_DIR": str(config.parent / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",  # one device each
            BATCHES: str(self._batches),
            EXAMPLES: str(self._examples),
        }

    def start(self, count: int = 1) -> list[subprocess.Popen]:
        """Starts or resumes the run with `count` processes."""
        flags = [[]]
        if count > 1:
            job = [f"--coordinator=localhost:{local.free_port()}", f"--num_processes={count}"]
            job += [f"--join_timeout={JOIN_S}"]
            flags = [[*job, f"--process_id={i}"] for i in range(count)]
        with self.log.open("a") as log:
            return [
                subprocess.Popen(
                    [*self._command, *more], cwd=ROOT, env=self._env, stdout=log, stderr=log
                )
                for more in flags
            ]

    def finish(self, count: int = 1) -> None:
        """Trains to the end. Raises RuntimeError, with the end of the log, if this fails."""
        processes = self.start(count)
        with contextlib.ExitStack() as stack:
            for process in processes:
                stack.callback(process.kill)
            self._check([process.wait() for process in processes], {0})

    def _check(self, codes: Sequence[int], allowed: set[int]) -> None:
        if set(codes) - allowed:
            raise RuntimeError(f"exit codes {codes}: {self.log.read_text()[-4000:]}")

    def num_read(self) -> int:
        """Returns the number of batches that all processes have read, repetitions included."""
        return self._batches.read_bytes().count(b"\n") if self._batches.exists() else 0

    def kill(self, rng: random.Random, startup: float, steps: int, count: int = 1) -> str:
        """Starts the run and kills a process at a random moment; returns when, "" if it had ended.

        Checks that the others end by themselves, with STOPPED and a line that names the one killed.

        Args:
          startup: seconds that a start takes.
          steps: number of steps within which to kill, if not in the startup.
        """
        printed = self.log.stat().st_size if self.log.exists() else 0
        processes, begin = self.start(count), time.monotonic()
        victim = rng.randrange(count)
        with contextlib.ExitStack() as stack:
            for process in processes:
                stack.callback(process.wait)
                stack.callback(process.kill)

            def running() -> bool:
                return None in [p.poll() for p in processes]

            if rng.random() < 0.3:
                moment, until = "startup", begin + rng.uniform(0, startup)
                while time.monotonic() < until and running():
                    time.sleep(0.01)
            else:
                goal = self.num_read() + count * rng.randint(1, steps)
                moment = f"after {goal} batches"
                while self.num_read() < goal and running():
                    time.sleep(0.01)
                time.sleep(rng.uniform(0, 0.3))
            processes[victim].kill()
            if processes[victim].wait() != -signal.SIGKILL:
                self._check([p.wait() for p in processes], {0})
                return ""
            moment = f"{moment}, {time.monotonic() - begin:.1f} s after the start"
            self._check_others(victim, processes, printed)
        return f"process {victim} of {count}, {moment}" if count > 1 else moment

    def _check_others(
        self, victim: int, processes: Sequence[subprocess.Popen], printed: int
    ) -> None:
        """Checks how the others end, by their codes and the log after its first bytes."""
        others = [p for i, p in enumerate(processes) if i != victim]
        codes = [p.wait(timeout=JOIN_S + END_S) for p in others]
        with self.log.open("rb") as log:
            log.seek(printed)
            lines = log.read().decode().splitlines()
        if set(codes) == {BAD_INPUT} and any("did not join within" in line for line in lines):
            return  # killed before it joined
        self._check(codes, {STOPPED})
        said = [line for line in lines if line.startswith(f"error: process {victim} is gone")]
        if len(said) != len(others):
            raise RuntimeError(f"{len(said)} of {len(others)} processes say that {victim} is gone")

    def metrics(self) -> list[dict[str, Any]]:
        """Returns the lines of metrics.jsonl that are whole."""
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in lines]

    def losses(self) -> dict[int, float]:
        """Returns the loss of each logged step."""
        return {line["step"]: line["loss"] for line in self.metrics() if "loss" in line}

    def batches(self) -> dict[int, set[str]]:
        """Returns the hashes that were read as each batch: one, however often it was read."""
        found: dict[int, set[str]] = defaultdict(set)
        for line in self._batches.read_text().split("\n"):
            number, _, digest = line.partition(" ")
            if len(digest) == 64:  # a kill can cut the last line
                found[int(number)].add(digest)
        return found

    def examples(self) -> dict[tuple[str, int], dict[int, set[int]]]:
        """Returns by task and epoch the examples that were read at each position."""
        found: dict = defaultdict(lambda: defaultdict(set))
        for line in self._examples.read_text().split("\n"):
            words = line.split(" ")
            if len(words) == 5 and words[-1] == "end":
                task, epoch, position, index, _ = words
                found[task, int(epoch)][int(position)].add(int(index))
        return found


if __name__ == "__main__":
    main(sys.argv)
