"""The exception for mistakes of the user; bugs raise other exceptions."""


class UserError(ValueError):
    """A mistake in a flag, a config or an input file.

    The message is one line: the flag or config key, the value found, and what is allowed. Commands
    print it and exit with code 2. Other exceptions propagate with their traceback.
    """
