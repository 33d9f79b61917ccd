"""Learning-rate schedules, optimizers by name, weight decay and the EMA."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.optim import OPTIMIZERS, OptimizerConfig, learning_rate, make_optimizer, update_ema


def test_paper_schedule_warms_up_then_decays_to_zero():
    rate = learning_rate(OptimizerConfig(), 2_500_000)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(5_000), 0.5e-4, rtol=1e-6)
    np.testing.assert_allclose(rate(10_000), 1e-4, rtol=1e-6)
    half = 10_000 + (2_500_000 - 10_000) // 2
    np.testing.assert_allclose(rate(half), 0.5e-4, rtol=1e-4)
    np.testing.assert_allclose(rate(2_500_000), 0, atol=1e-12)


def test_the_constant_schedule_warms_up_and_a_short_run_stays_finite():
    rate = learning_rate(OptimizerConfig(schedule="constant", warmup_steps=10), 1000)
    np.testing.assert_allclose([rate(5), rate(10), rate(999)], [0.5e-4, 1e-4, 1e-4], rtol=1e-6)
    # A warm-up longer than the run must not break the schedule.
    assert np.isfinite(learning_rate(OptimizerConfig(warmup_steps=10_000), 5)(4))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_shrinks_a_quadratic(name):
    config = OptimizerConfig(
        name=name, learning_rate=0.05, warmup_steps=0, grad_clip=1.0, schedule="constant"
    )
    optimizer = make_optimizer(config, 100)
    params = {"w": jnp.full((4, 4), 2.0), "b": jnp.full((4,), -1.0)}
    state = optimizer.init(params)
    for _ in range(100):
        grads = {"w": params["w"], "b": params["b"]}
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert float(jnp.abs(params["w"]).max()) < 0.5


def test_adafactor_is_optax_with_its_defaults():
    config = OptimizerConfig(warmup_steps=0, schedule="constant")
    ours, theirs = make_optimizer(config, 10), optax.adafactor(1e-4)
    params = {"w": jnp.arange(256 * 256.0).reshape(256, 256) / 1e4}
    grads = {"w": jnp.sin(params["w"])}
    a, _ = ours.update(grads, ours.init(params), params)
    b, _ = theirs.update(grads, theirs.init(params), params)
    np.testing.assert_array_equal(a["w"], b["w"])


def test_adafactor_grows_zero_weights_as_slowly_as_documented():
    """At 1e-4 zeros reach an RMS of 0.02 after 40,000 steps; at 1e-2, after 400."""
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=0, schedule="constant")
    optimizer = make_optimizer(config, 1000)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jnp.ones((4, 4)), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.abs(params).mean()

    params = jnp.zeros((4, 4))
    _, rms = jax.lax.scan(step, (params, optimizer.init(params)), length=450)
    assert int(jnp.argmax(rms > 1e-3)) == pytest.approx(100, abs=2)
    assert int(jnp.argmax(rms > 0.02)) == pytest.approx(400, abs=10)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion"])
def test_weight_decay_is_scaled_by_the_learning_rate(name):
    """Without a gradient each step only multiplies a weight by 1 - rate(step) * weight_decay."""
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=2, weight_decay=0.01)
    optimizer, rate = make_optimizer(config, 6), learning_rate(config, 6)
    params = {"w": jnp.full((256, 256), 2.0), "b": jnp.full((3,), -1.0)}
    zeros, state = jax.tree.map(jnp.zeros_like, params), optimizer.init(params)
    for step in range(6):
        updates, state = optimizer.update(zeros, state, params)
        for key, weight in params.items():
            expected = -rate(step) * 0.01 * weight
            np.testing.assert_allclose(updates[key], expected, rtol=1e-5, atol=1e-12)
        params = optax.apply_updates(params, updates)


def test_adam_refuses_weight_decay():
    words = r"config\.optimizer\.weight_decay is 0\.01; .*adamw"
    with pytest.raises(UserError, match=words) as error:
        OptimizerConfig(name="adam", weight_decay=0.01)
    assert "\n" not in str(error.value)


def test_ema_is_the_plain_average_after_warm_up():
    ema, params = {"w": jnp.ones(3)}, {"w": jnp.zeros(3)}
    early = update_ema(ema, params, 0.9999, jnp.array(0))
    late = update_ema(ema, params, 0.9999, jnp.array(10**9))
    np.testing.assert_allclose(early["w"], 0.1, rtol=1e-6)
    np.testing.assert_allclose(late["w"], 0.9999, rtol=1e-6)


@pytest.mark.parametrize(
    "values", [{"name": "sgd"}, {"schedule": "step"}, {"learning_rate": -1.0}, {"grad_clip": -1.0}]
)
def test_bad_values_are_refused(values):
    with pytest.raises(UserError, match=r"config\.optimizer\."):
        OptimizerConfig(**values)
