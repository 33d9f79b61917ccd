"""Checks the files of a run: checkpoints against their checksums, the rest for being readable.

    python -m imagen_jax.verify --workdir=runs/demo

Prints a line per file or checkpoint. Changes nothing, and may run while the run trains. Training
does the same check of each checkpoint that it reads, and passes over a damaged one. The files of an
exported model are compared with its hashes.

Exit codes: 0 if all is whole; 65 if something is damaged; 2 for bad input.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import DAMAGED, RunError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    flags.DEFINE_string("workdir", None, "Directory of the run (default: the only one in runs/).")


def main(argv: Sequence[str]) -> None:
    """Prints the state of every file of the run."""
    del argv
    from imagen_jax.runs import verification
    from imagen_jax.runs import workdir as runs

    workdir = FLAGS.workdir or runs.only_run()
    runs.check_run(workdir)
    workdir = to_path(workdir)
    damaged = []
    for path, problem in verification.problems(workdir):
        print(f"{'damaged' if problem else 'whole':<8} {path}" + (f": {problem}" * bool(problem)))
        if problem:
            damaged.append(path)
    if damaged:
        more = f" and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        raise RunError(DAMAGED, f"{damaged[0]}{more} damaged; training resumes from whole ones")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
