"""Calls the export command in this process."""

import contextlib

from absl import flags
from absl.testing import flagsaver

from imagen_jax import export


@contextlib.contextmanager
def defined_flags():
    """Defines the command's flags; other commands define some of them too."""
    before = set(flags.FLAGS)
    export.define_flags()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def call(out, *args):
    """Calls the command with flags; returns the folder it wrote."""
    with flagsaver.flagsaver():
        flags.FLAGS(["export", f"--out={out}", *args])
        export.main([])
    return out
