"""The order of examples: bijections that any number of hosts can resume from one number."""

import numpy as np
import pytest

from data_pipelines.reading.order import CYCLE, RUN, Interleave, Order


def epoch(order, number):
    return order.index(np.arange(number * order.num, (number + 1) * order.num))


@pytest.mark.parametrize("window", [0, RUN, 64, 4096])
@pytest.mark.parametrize("num", [1, 7, RUN, 100, 1024, 1031])
def test_each_epoch_has_every_record_once_in_its_own_order(num, window):
    order = Order(num, 3, window)
    first, second = epoch(order, 0), epoch(order, 1)
    assert sorted(first) == sorted(second) == list(range(num))
    if num > 2 * RUN:
        assert first.tolist() != second.tolist()
        assert first.tolist() != epoch(Order(num, 4, window), 0).tolist()


def test_a_window_reads_few_runs_and_separates_the_records_of_each():
    order = Order(100_000, 0, window=1024)
    lanes = 1024 // RUN
    indices = epoch(order, 0)
    for start in (0, 50 * 1024):
        window = indices[start : start + 1024].reshape(-1, lanes)
        runs = window // RUN
        assert (runs == runs[0]).all() and len(set(runs[0])) == lanes
        # The runs of a window are spread over the whole dataset.
        assert np.corrcoef(np.arange(lanes), runs[0])[0, 1] < 0.5 and np.ptp(runs[0]) > 4000
    # A host's rows of batches of 64 are from its own lanes, so it reads whole runs.
    rows = indices[:1024].reshape(-1, 64)[:, 16:32]
    assert len(np.unique(rows // RUN)) == rows.size // RUN


def test_positions_far_into_a_long_stream_need_no_memory():
    order = Order(10**9, 1, window=2**16)
    far = np.arange(123 * 10**9 + 456, 123 * 10**9 + 456 + 2**16)
    indices = order.index(far)
    assert len(np.unique(indices)) == len(indices) and indices.max() < 10**9
    assert (order.epoch(far) == 123).all()


@pytest.mark.parametrize("weights", [(1,), (1, 1), (0.7, 0.2, 0.1), (460, 400), (1, 1e-9)])
def test_a_mixture_covers_every_task_without_gaps_at_its_rate(weights):
    tasks, places = Interleave(weights).locate(np.arange(3 * CYCLE))
    for number, weight in enumerate(weights):
        mine = places[tasks == number]
        assert mine.tolist() == list(range(len(mine)))
        share = weight / sum(weights)
        assert abs(len(mine) - share * 3 * CYCLE) <= 3
        # The task is spread evenly: no stretch has many more or fewer of it.
        counts = np.add.reduceat(tasks == number, np.arange(0, 3 * CYCLE, 64))
        assert np.abs(counts - share * 64).max() <= 2


def test_a_mixture_resumes_anywhere():
    mixture = Interleave((0.6, 0.4))
    everywhere = np.stack(mixture.locate(np.arange(2 * CYCLE)))
    there = np.stack(mixture.locate(np.arange(CYCLE + 5, CYCLE + 50)))
    np.testing.assert_array_equal(there, everywhere[:, CYCLE + 5 : CYCLE + 50])
