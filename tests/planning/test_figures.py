"""The cost of a run follows from its chip-hours."""

import pytest

from imagen_jax.planning import figures


def test_dollars_of_a_run_follow_from_its_chip_hours():
    found = figures.dollars({"chip_hours": 300.0, "num_steps": 5000}, 3.0)
    assert found == {
        "price_per_chip_hour": 3.0,
        "dollars": pytest.approx(900.0),
        "dollars_per_1000_steps": pytest.approx(180.0),
    }
