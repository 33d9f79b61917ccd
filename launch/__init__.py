"""Starts training on several hosts; docs/launch.md explains how."""

# Workers import this package with the VM's own Python, so import only the standard library.
import sys


def pop_train_args():
    """Removes `--` and everything after it from sys.argv, and returns what followed it."""
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    train_args = sys.argv[cut + 1 :]
    del sys.argv[cut:]
    return train_args
