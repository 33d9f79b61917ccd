import exports
import pytest


@pytest.fixture(scope="module")
def export_flags():
    with exports.defined_flags():
        yield


@pytest.fixture
def command(export_flags, tmp_path):
    """Calls the command with flags; returns the folder it wrote."""

    def call(*args, out=None):
        return exports.call(out or tmp_path / "out", *args)

    return call
