"""The one exception for what a user got wrong, as opposed to what the program got wrong."""


class UserError(ValueError):
    """A mistake in a flag, a config or an input file.

    The message is one line: the flag or config key, the value found, and what is allowed. Command
    lines print it and exit with code 2; everything else propagates with its trace.
    """
