"""The one exception for a user's mistakes; a mistake of the program raises anything else."""


class UserError(ValueError):
    """A mistake in a flag, a config or an input file.

    The message is one line: the flag or config key, the value found, and what is allowed. Commands
    print it and exit with code 2. Other exceptions propagate with their traceback.
    """
