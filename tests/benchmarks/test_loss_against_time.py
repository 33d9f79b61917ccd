"""How many times sooner one network reaches the final loss of another."""

from types import SimpleNamespace

import pytest

from benchmarks.loss_against_time import sooner


def run(*losses):
    """A run with a point every 10 seconds: (step, seconds, loss)."""
    return SimpleNamespace(points=[(i, 10.0 * i, loss) for i, loss in enumerate(losses)])


def test_the_time_is_interpolated_between_points():
    assert sooner(run(1.0, 0.9, 0.8), run(1.0, 0.7, 0.5)) == pytest.approx(20 / (10 * 2 / 3))


@pytest.mark.parametrize(
    "fast", [(1.0, 0.95, 0.9), (0.5, 0.4, 0.3)], ids=["never", "from the start"]
)
def test_there_is_no_ratio_without_a_crossing(fast):
    assert sooner(run(1.0, 0.9, 0.8), run(*fast)) is None
