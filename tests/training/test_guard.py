"""When steps count as skipped too often, and which losses are spikes."""

import pytest

from imagen_jax.common.errors import DIVERGED, RunError
from imagen_jax.sections import GuardConfig
from imagen_jax.training.guard import LEAST, Guard


def test_the_run_goes_back_once_every_host_has_seen_the_step():
    guard = Guard(GuardConfig(max_skips=2), delay=16)
    for step, skipped in enumerate([True, True, False, True, True], start=1):
        guard.see(step, skipped, 1.0)
    assert not guard.diverged and guard.skips == 2
    guard.see(6, True, 1.0)
    guard.see(7, False, 1.0)
    assert guard.diverged and not guard.steady
    assert not guard.decides(21) and guard.decides(22)
    assert guard.go_back(22, checkpoint=4) == 1
    assert guard.steady and not guard.decides(100)


def test_only_returns_to_the_same_place_count():
    guard = Guard(GuardConfig(max_rollbacks=1), delay=0)
    assert [guard.go_back(9, 4), guard.go_back(9, 8)] == [1, 1]
    with pytest.raises(RunError, match="diverged at step 9, after 1 returns to step 4") as e:
        guard.go_back(9, 4)
    assert e.value.code == DIVERGED


def test_a_spike_is_far_above_the_losses_before_it():
    guard = Guard(GuardConfig(spike_factor=3.0), delay=0)
    losses = [1.0 + 0.01 * (i % 7) for i in range(LEAST)]
    assert not any(
        guard.see(i, False, loss) for i, loss in enumerate([*losses[:5], 9, *losses[5:]])
    )
    assert guard.see(50, False, 3.5) and not guard.see(51, False, 2.5)
    assert not guard.see(52, True, 100.0), "a step that was skipped is reported as such"
    off = Guard(GuardConfig(spike_factor=0.0), delay=0)
    assert not any(off.see(i, False, 10.0**i) for i in range(2 * LEAST))
