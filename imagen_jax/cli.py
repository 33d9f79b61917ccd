"""What every command line shares: absl flags, one-line errors, exit code 2 for bad input."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from absl import app, flags

from imagen_jax.errors import UserError

BAD_INPUT = 2


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses flags and rejects leftover positional arguments, which absl would ignore."""
    try:
        rest = flags.FLAGS(argv)
    except flags.Error as e:
        fail(str(e).replace("\n", " "))
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags are written --name=value (see --help)")
    return rest


def fail(message: str) -> None:
    """Prints `error: message` to stderr and exits with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(BAD_INPUT)


def run(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main(argv)` as a program whose user errors are one line on stderr and exit code 2."""

    def guarded(argv: Sequence[str]) -> None:
        try:
            main(argv)
        except UserError as e:
            fail(str(e))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(130)

    app.run(guarded, flags_parser=_parse)
