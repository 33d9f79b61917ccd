"""The short form of tests/faults/fuzz.py: the same inputs in every run."""

import logging

import pytest

pytest.importorskip("hypothesis")

from faults import fuzz


@pytest.mark.parametrize("name", fuzz.TARGETS)
@pytest.mark.filterwarnings("ignore")
def test_no_input_makes_a_reader_fail_other_than_in_one_line(name, caplog):
    with caplog.at_level(logging.CRITICAL):
        counts = fuzz.fuzz(name, 150)
    assert sum(counts.values()) >= 100
