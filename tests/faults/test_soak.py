"""The short form of tests/faults/soak.py."""

import pytest
from faults import soak


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_run_that_is_killed_three_times_equals_one_left_alone(tmp_path, in_memory):
    assert soak.soak(3, num_steps=20, in_memory=in_memory, seed=1, folder=tmp_path) == []
