"""The exceptions that end a command with one line, and its exit codes."""

import re

# Exit codes of every command, beyond 0; docs/launch.md says what a supervisor does with each.
BAD_INPUT = 2
# Codes of sysexits.h: "data format error", "internal software error", "input/output error" and
# "temporary failure, try again".
DAMAGED, DIVERGED, WORKDIR_FAILED, STOPPED = 65, 70, 74, 75


class UserError(ValueError):
    """A mistake in a flag, a config or an input file.

    The message is one line: the flag or config key, the value found, and what is allowed. Commands
    print it and exit with code 2. Other exceptions, except RunError, propagate with their
    traceback.
    """

    code = BAD_INPUT


class RunError(RuntimeError):
    """A failure of a run that its input did not cause, such as a full disk.

    The message is one line: what failed, where, and the next command if there is one. Commands
    print it and exit with `code`.
    """

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def first_line(error: Exception) -> str:
    """Returns the first line of an error message, without locations in the library's source."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return re.split(r" \[(?:source loc|tensorstore_spec)", first)[0]
