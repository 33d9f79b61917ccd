"""Starts training on many hosts; see docs/launch.md."""

# Workers import this package with the VM's own Python, so it must need nothing else.
import sys


def pop_train_args():
    """Removes `--` and the words after it from sys.argv; returns those words."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    train_args = sys.argv[cut + 1 :]
    del sys.argv[cut:]
    return train_args
