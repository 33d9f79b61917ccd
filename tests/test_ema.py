"""Power-function averages have their widths, and any width is rebuilt from snapshots of two."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.ema import EmaConfig, coefficients, exponent, update_averages
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.sections import CheckpointConfig
from imagen_jax.training.step import TrainState, init_state

KEPT, WANTED = (0.05, 0.10), (0.02, 0.07, 0.15, 0.25)
STEPS, EVERY = 2000, 40


@pytest.mark.parametrize("width, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_exponents_are_those_of_the_paper(width, gamma):
    assert exponent(width) == pytest.approx(gamma, abs=0.01)


@pytest.mark.parametrize("width", [*KEPT, *WANTED])
def test_an_average_of_the_step_numbers_shows_its_width(width):
    """Averages of t and t^2 give the mean and the standard deviation of the profile."""

    def body(averages, step):
        t = (step + 1).astype(jnp.float32) / STEPS
        return update_averages(averages, jnp.stack([t, t**2]), (width,), step), None

    (found,), _ = jax.lax.scan(body, (jnp.zeros(2),), jnp.arange(STEPS))
    mean, square = np.asarray(found, np.float64)
    assert np.sqrt(square - mean**2) == pytest.approx(width, rel=0.02)
    gamma = exponent(width)
    assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_late_steps_keep_their_precision():
    """At step a million, 1 - (1 - 1 / t)^(gamma + 1) is about (gamma + 1) / t, 1.8e-5."""
    averages = update_averages((jnp.zeros(1),), jnp.ones(1), (0.05,), jnp.array(999_999))
    np.testing.assert_allclose(averages[0], (exponent(0.05) + 1) / 1e6, rtol=1e-3)


@functools.cache
def trained():
    """Averages of every width after each step of a random walk: [steps, widths, 100]."""
    rng = np.random.default_rng(0)
    walk = rng.normal(size=100) + np.cumsum(0.02 * rng.normal(size=(STEPS, 100)), axis=0)

    def body(averages, inputs):
        step, params = inputs
        averages = update_averages(averages, params, (*KEPT, *WANTED), step)
        return averages, jnp.stack(averages)

    start = (jnp.zeros(100),) * len((*KEPT, *WANTED))
    inputs = (jnp.arange(STEPS), jnp.asarray(walk, jnp.float32))
    return walk, np.asarray(jax.lax.scan(body, start, inputs)[1])


@pytest.mark.parametrize("last", [STEPS, STEPS - 10 * EVERY])
@pytest.mark.parametrize("width", WANTED)
def test_a_rebuilt_width_is_within_one_percent_of_the_tracked_one(width, last):
    """The error of a rebuilt average, relative to the distance of the weights from the average."""
    walk, averages = trained()
    steps = np.arange(EVERY, last + 1, EVERY)
    pairs = [(s, w) for s in steps for w in KEPT]
    weights, error = coefficients(*zip(*pairs, strict=True), last, width)
    snapshots = averages[steps - 1][:, : len(KEPT)].reshape(len(pairs), -1)
    tracked = averages[last - 1, len(KEPT) + WANTED.index(width)]
    distance = np.linalg.norm(weights @ snapshots - tracked)
    assert distance < 0.01 * np.linalg.norm(tracked - walk[last - 1])
    assert error < 0.05 and weights.sum() == pytest.approx(1, abs=1e-6)


def test_a_kept_width_is_its_own_snapshot_and_sparse_snapshots_are_noticed():
    pairs = [(s, w) for s in range(EVERY, STEPS + 1, EVERY) for w in KEPT]
    weights, error = coefficients(*zip(*pairs, strict=True), STEPS, 0.05)
    np.testing.assert_allclose(weights, [float(p == (STEPS, 0.05)) for p in pairs], atol=1e-6)
    assert error < 1e-4
    _, error = coefficients([1000, 1000, 2000, 2000], KEPT * 2, 2000, 0.02)
    assert error > 0.3


def test_a_state_without_averages_restores_from_checkpoints_that_never_had_them(tmp_path):
    state = init_state({"w": jnp.arange(4.0)}, optax.adam(1e-3))
    assert state.averages == ()
    before = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    del before["averages"]
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, before, {"examples": 0}, {})
    checkpoints.wait()
    restored, _ = checkpoints.restore(jax.tree.map(_abstract, state), {})
    checkpoints.close()
    assert isinstance(restored, TrainState)
    jax.tree.map(np.testing.assert_array_equal, restored, state)


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"widths": (0.05,), "snapshot_every": 10}, r"ema.widths is \(0.05,\); allowed: \(\), or"),
        ({"widths": (0.05, 0.05), "snapshot_every": 10}, "ema.widths is"),
        ({"widths": (0.05, 0.5), "snapshot_every": 10}, "ema.widths is"),
        ({"widths": (0.05, 0.1)}, "ema.snapshot_every is 0; allowed: 1 or more with ema.widths"),
        ({"snapshot_every": 5}, "ema.snapshot_every is 5; allowed: .*else 0"),
    ],
)
def test_bad_values_are_user_errors(values, words):
    with pytest.raises(UserError, match=words):
        EmaConfig(**values)
