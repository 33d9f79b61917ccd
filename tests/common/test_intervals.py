"""The Wilson interval matches published values and stays within [0, 1]."""

import pytest

from imagen_jax.common.intervals import wilson


# Newcombe, "Two-sided confidence intervals for the single proportion" (1998), table I, method 3.
@pytest.mark.parametrize(
    ("successes", "total", "low", "high"),
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_the_published_table(successes, total, low, high):
    assert wilson(successes, total) == pytest.approx((low, high), abs=5e-5)


def test_the_interval_is_symmetric_and_within_0_and_1():
    low, high = wilson(3, 20)
    assert wilson(17, 20) == pytest.approx((1 - high, 1 - low))
    assert wilson(0, 5)[0] == 0.0 and wilson(5, 5)[1] == 1.0


def test_a_larger_z_widens_the_interval():
    narrow, wide = wilson(5, 20), wilson(5, 20, z=2.576)
    assert wide[0] < narrow[0] < narrow[1] < wide[1]
