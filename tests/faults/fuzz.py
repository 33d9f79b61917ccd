"""Feeds damaged and hostile files to every reader.

    python -m tests.faults.fuzz --num=1000000

A reader may return, refuse the file in one line (UserError, RunError), or skip a record and say why
(Bad, Skip). Anything else fails: another exception, a message of several lines, more than HANG_S
seconds, or MEMORY more bytes. Hypothesis then looks for the smallest input that fails in the same
way, and prints it. --only=NAME feeds one reader. Exit codes: 0 nothing failed; 1 something did.

The files are valid ones with bytes flipped, cut, inserted, repeated or overwritten by extreme
numbers; JSON has values and keys replaced, and records are damaged within valid checksums.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from imagen_jax.common.errors import RunError, UserError

from . import fuzz_data, fuzz_runs
from .damage import Target

HANG_S = 20
MEMORY = 2**29

TARGETS: dict[str, Callable[[], Target]] = {
    "records": fuzz_data.records,
    "offsets": fuzz_data.offsets,
    "dataset": fuzz_data.dataset,
    "manifest": fuzz_data.manifest,
    "tars": fuzz_data.tars,
    "store": fuzz_data.store,
    "lists": fuzz_data.lists,
    "coco": fuzz_data.coco,
    "webdataset": fuzz_data.webdataset,
    "images": fuzz_data.images,
    "safetensors": fuzz_runs.safetensors,
    "torch": fuzz_runs.torch,
    "vocabularies": fuzz_runs.vocabularies,
    "workdir": fuzz_runs.workdir,
    "configs": fuzz_runs.configs,
    "messages": fuzz_runs.messages,
}


class Hang(BaseException):
    """A reader took more than HANG_S seconds."""


@contextlib.contextmanager
def _limited(name: str) -> Iterator[None]:
    """Fails if the block takes HANG_S seconds or MEMORY bytes."""

    def late(number, frame):
        raise Hang(f"{name}: more than {HANG_S} seconds")

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MEMORY, f"{name}: {grown:,} bytes more"


def fuzz(name: str, num: int, seed: int | None = None) -> dict[str, int]:
    """Feeds `num` inputs to a reader; returns how many it took and refused.

    Args:
      seed: of the inputs; None takes the same ones in every run.

    Raises:
      Exception: what the reader raised for the smallest input found.
    """
    target = TARGETS[name]()
    counts = {"taken": 0, "refused": 0}

    with tempfile.TemporaryDirectory(prefix="fuzz_") as folder:

        @settings(
            max_examples=num, derandomize=seed is None, database=None, deadline=None,
            suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
        )  # fmt: skip
        @given(target.inputs)
        def check(value: Any) -> None:
            with _limited(name):
                try:
                    target.read(value, Path(folder))
                    counts["taken"] += 1
                except (UserError, RunError) as e:
                    assert "\n" not in str(e), str(e)
                    assert len(str(e)) < 20_000, f"a line of {len(str(e)):,} characters"
                    counts["refused"] += 1

        (check if seed is None else seeded(seed)(check))()
    return counts


def main(argv: Sequence[str]) -> None:
    """Parses the flags and exits with the result."""
    import logging
    import traceback

    from absl import flags

    from imagen_jax.common import cli

    flags.DEFINE_integer("num", 100_000, "Number of inputs, over all readers.", lower_bound=1)
    flags.DEFINE_integer("seed", None, "Seed of the inputs (default: another one every time).")
    flags.DEFINE_list("only", list(TARGETS), "Readers to feed.")

    def run(argv: Sequence[str]) -> None:
        f = flags.FLAGS
        if unknown := set(f.only) - TARGETS.keys():
            raise UserError(f"--only has {min(unknown)!r}; allowed: {', '.join(TARGETS)}")
        seed = random.randrange(2**32) if f.seed is None else f.seed
        cli.log.setLevel(logging.ERROR)
        failed = 0
        for name in f.only:
            try:
                counts = fuzz(name, -(-f.num // len(f.only)), seed)
                print(
                    f"{name}: {counts['taken']:,} taken, {counts['refused']:,} refused", flush=True
                )
            except (Exception, Hang):
                failed += 1
                print(f"{name}: FAILED, with --seed={seed}", flush=True)
                traceback.print_exc()
        sys.exit(bool(failed))

    cli.run(run)


if __name__ == "__main__":
    main(sys.argv)
