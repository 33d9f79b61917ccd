"""The export command, called in this process."""

import pytest
from absl import flags
from absl.testing import flagsaver

from imagen_jax import export


@pytest.fixture(scope="module")
def export_flags():
    before = set(flags.FLAGS)
    export.define_flags()
    yield
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


@pytest.fixture
def command(export_flags, tmp_path):
    """Calls the command with flags; returns the folder it wrote."""

    def call(*args, out=None):
        out = out or tmp_path / "out"
        with flagsaver.flagsaver():
            flags.FLAGS(["export", f"--out={out}", *args])
            export.main([])
        return out

    return call
