"""Held-out splits of the datasets that a builder writes."""

import pytest

from data_pipelines.common import Skip
from data_pipelines.records import splits, writing


def hold_out(num, fraction=0.02, seed=0, broken=()):
    """Holds out of `num` candidates; returns the numbers in (train, validation)."""

    def load(item):
        return Skip(item[0], "broken") if int(item[0]) in broken else {}

    items = [(str(i),) for i in range(num)]
    found = writing.hold_out(items, load, fraction, seed)
    return [[int(item[0]) for item in split.items] for split in found.values()]


def test_candidates_stay_held_out_when_others_are_added():
    train, held_out = hold_out(190, 0.1)
    assert (len(train), len(held_out)) == (171, 19)
    assert sorted(train + held_out) == list(range(190))
    _, more = hold_out(200, 0.1)
    assert len(set(held_out) & set(more)) >= 15
    assert held_out != hold_out(190, 0.1, seed=1)[1]


def test_what_is_held_out_is_usable_and_enough_for_a_grid(capsys):
    _, before = hold_out(100)
    assert len(before) == splits.GRID == 16
    broken = before[:5]
    train, held_out = hold_out(100, broken=broken)
    assert len(held_out) == 16 and set(before) - set(held_out) == set(broken) <= set(train)
    assert hold_out(100, 0.0)[1] == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("num", "broken", "held_out"), [(31, (), 15), (2, (), 1), (1, (), 0)])
def test_too_few_for_a_grid_says_so(capsys, num, broken, held_out):
    assert len(hold_out(num, broken=broken)[1]) == held_out
    message = f"holding out only {held_out} of {num} examples: a grid of 16 samples takes 32"
    assert message in capsys.readouterr().err
