"""Lower bounds and the predicted time of a step, from counted costs."""

import dataclasses

import pytest
from planning_helpers import V4

from imagen_jax.planning import costs, roofline


def operations(**kwargs):
    return costs.Costs([costs.Operation(3, **kwargs), costs.Operation(1, flops=1e12)], {})


def test_the_roofline_is_the_largest_bound():
    counted = operations(flops=2e12, bytes=1.2e9)
    received = {"all-gather": {"count": 1, "bytes": 2e9}}
    counted = dataclasses.replace(counted, collectives=received)
    step = roofline.estimate(counted, {"flops": 3e12, "bytes accessed": 1.2e9}, V4, fast=True)
    # XLA counts 3 TFLOP; 2 of them are in a loop that runs three times.
    assert step.flops == pytest.approx(7e12)
    bounds = {"compute": 7e12 / 275e12, "memory": 3.6e9 / 1.2e12, "interconnect": 2e9 / 100e9}
    assert step.bounds == pytest.approx(bounds)
    assert (step.binds, step.step_s) == ("compute", pytest.approx(7 / 275))
    assert step.compiler_s is None


def test_synchronous_collectives_add_to_the_chips_own_work():
    alone = costs.Operation(2, bytes=1e9, cycles=7, waits_for=1e9)
    counted = operations(flops=2e12, cycles=int(0.02 * V4.chip.clock_hz))
    counted = dataclasses.replace(counted, operations=[*counted.operations, alone])
    xla = {"flops": 3e12, "bytes accessed": 1.0, "optimal_seconds": 0.0}
    step = roofline.estimate(counted, xla, V4, fast=False)
    assert step.exposed_s == pytest.approx(2 * 1e9 / 100e9)
    assert step.compiler_s == pytest.approx(3 * 0.02 + 1e12 / 275e12)
    assert step.step_s == pytest.approx(step.compiler_s + step.exposed_s)
    # --fast makes all-gathers synchronous; in training they overlap, so they do not count.
    gathered = dataclasses.replace(counted, collectives={"all-gather": {"count": 1, "bytes": 5e8}})
    step = roofline.estimate(gathered, xla, V4, fast=True)
    assert step.exposed_s == pytest.approx((2e9 - 5e8) / 100e9)


def test_a_step_takes_at_least_as_long_as_its_traffic_off_the_chip():
    received = {"all-reduce": {"count": 1, "bytes": 1e9}, "between-slices": {"bytes": 1e9}}
    counted = dataclasses.replace(operations(flops=0.0), collectives=received)
    step = roofline.estimate(counted, {"flops": 1e12, "bytes accessed": 0.0}, V4, fast=True)
    assert step.bounds["network"] == step.step_s == pytest.approx(1 / 6.25)
    assert step.binds == "network" and "host" not in step.bounds
    assert step.bounds["interconnect"] == pytest.approx(1 / 100)
    counted = dataclasses.replace(counted, host_bytes=30e9)
    step = roofline.estimate(counted, {"flops": 1e12, "bytes accessed": 0.0}, V4, fast=True)
    assert step.bounds["host"] == step.step_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("fast", "optimal", "expected"),
    [
        (False, 0.05, (0.06, "cycles")),
        (True, 0.05, (0.05 * 7 / 3, "optimal_seconds")),
        (True, -0.99, (None, "")),
    ],
)
def test_the_compilers_estimate_counts_if_it_is_plausible(fast, optimal, expected):
    cycles = int(V4.chip.clock_hz * (0.06 - 1e12 / 275e12) / 3)
    counted = operations(flops=2e12, cycles=cycles)
    xla = {"flops": 3e12, "bytes accessed": 1.0, "optimal_seconds": optimal}
    step = roofline.estimate(counted, xla, V4, fast)
    assert (step.compiler_s, step.source) == (
        expected[0] and pytest.approx(expected[0]),
        expected[1],
    )
    assert step.step_s == (step.compiler_s or step.roofline_s)
