"""Learning-rate schedules, optimizers by name, weight decay and the EMA."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import load_config, shrink, shrink_sr
from networks import jit

from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.devices import sharding
from imagen_jax.optim import (
    OPTIMIZERS,
    OptimizerConfig,
    is_hidden_matrix,
    learning_rate,
    make_optimizer,
    stack_matrices,
    unstack_matrices,
    update_ema,
)
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.sections import CheckpointConfig
from imagen_jax.stage import Stage


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


@pytest.mark.parametrize("name", ["adafactor", "adamw", "lion", "muon"])
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


def newton_schulz(g):
    """Muon's orthogonalization of one matrix [in, out], from its definition, in float64."""
    x = np.asarray(g, np.float64)
    x = x / np.linalg.norm(x)
    if transposed := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if transposed else x


def muon_params():
    """Weights of a network: matrices, a convolution, stacks of both, and what Adam updates."""
    shapes = {
        ("blocks", "0", "kernel"): (6, 4),
        ("blocks", "1", "kernel"): (3, 3, 4, 5),
        ("blocks", "2", "kernel"): (6, 4),
        ("encoder", "stacked", "kernel"): (2, 5, 7),
        ("encoder", "stacked_conv", "kernel"): (2, 3, 3, 4, 3),
        ("encoder", "stacked", "bias"): (2, 7),
        ("blocks", "0", "scale"): (4,),
        ("conditioner", "time", "kernel"): (4, 6),
        ("stem", "kernel"): (3, 3, 3, 4),
        ("head", "kernel"): (4, 3),
    }
    rng, params = np.random.default_rng(0), {}
    for path, shape in shapes.items():
        node = params
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return params


@functools.cache
def muon_steps(config):
    """Returns the gradients and the updates of the first two steps."""
    optimizer, params = make_optimizer(config, 100), muon_params()
    state, update, history = optimizer.init(params), jit(optimizer.update), []
    for step in (1, 2):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(step * p), params)
        updates, state = update(grads, state, params)
        history.append((grads, updates))
    return history


MUON = OptimizerConfig(
    name="muon", learning_rate=0.02, adam_learning_rate=0.002, warmup_steps=0, schedule="constant"
)


def test_muon_is_newton_schulz_of_the_momentum_matrix_by_matrix():
    """Two steps with Nesterov momentum, whose averages are corrected for their zero start."""
    (g1, _), (g2, updates) = muon_steps(MUON)
    paths = [*(("blocks", i) for i in "012"), ("encoder", "stacked"), ("encoder", "stacked_conv")]
    for path in paths:
        first, second, update = (t[path[0]][path[1]]["kernel"] for t in (g1, g2, updates))
        first, second = (np.asarray(g, np.float64) for g in (first, second))
        average = 0.95 * 0.05 * first + 0.05 * second
        momentum = 0.95 * average / (1 - 0.95**3) + 0.05 * second / (1 - 0.95**2)
        fan_out = momentum.shape[-1]
        layers = momentum.shape[0] if momentum.ndim % 2 else 1
        for m, u in zip(
            momentum.reshape(layers, -1, fan_out), update.reshape(layers, -1, fan_out), strict=True
        ):
            scale = np.sqrt(max(1, fan_out / m.shape[0]))
            np.testing.assert_allclose(u, -0.02 * scale * newton_schulz(m), rtol=1e-3, atol=1e-6)
            assert np.linalg.svd(u / scale / 0.02, compute_uv=False).min() > 0.3


def test_muon_leaves_the_other_weights_to_adam():
    params, adam = muon_params(), optax.adamw(0.002, nesterov=True, weight_decay=0)
    state, update = adam.init(params), jit(adam.update)
    for grads, updates in muon_steps(MUON):
        expected, state = update(grads, state, params)
        for path, theirs in jax.tree_util.tree_leaves_with_path(expected):
            ours = functools.reduce(lambda tree, entry: tree[entry.key], path, updates)
            matrix = path[-1].key == "kernel" and path[0].key in ("blocks", "encoder")
            assert np.allclose(ours, theirs, rtol=1e-5) != matrix, path


@pytest.mark.parametrize(
    "name, shrunk", [("demo", lambda config: config), ("base64", shrink), ("sr256", shrink_sr)]
)
def test_muon_updates_most_weights_of_the_networks(name, shrunk):
    """Every kernel in the blocks except modulation; no stack of norms counts as a matrix."""
    params = Stage(parse(shrunk(load_config(name)))).abstract_params
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for path, weight in leaves:
        names = [entry.key for entry in path]
        inside = names[0] in ("blocks", "encoder", "decoder") and "modulation" not in names
        assert is_hidden_matrix(path, weight) == (inside and path[-1].key == "kernel"), path
    stacked = jax.eval_shape(stack_matrices, params)
    hidden, every = (sum(x.size for x in jax.tree.leaves(t)) for t in (stacked["muon"], params))
    assert hidden > 0.4 * every
    assert len(stacked["muon"]) + len(stacked["adam"]) < len(leaves)


def test_stacking_matrices_is_reversible():
    params = muon_params()
    again = unstack_matrices(stack_matrices(params), params)
    jax.tree.map(np.testing.assert_array_equal, again, params)


def test_muon_with_a_sharded_and_restored_state_takes_the_same_steps(monkeypatch, tmp_path):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=2, tensor=2))
    optimizer, params = make_optimizer(MUON, 100), muon_params()
    shapes = jax.eval_shape(optimizer.init, params)
    shardings = sharding.weight_shardings(mesh, shapes)
    state = jit(optimizer.init, out_shardings=shardings)(params)
    split = [x for x in jax.tree.leaves(state) if not x.sharding.is_fully_replicated]
    assert len(split) > 6
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, state, {"examples": 0}, {})
    checkpoints.wait()
    state, _ = checkpoints.restore(sharding.with_shardings(shapes, shardings), {})
    checkpoints.close()
    params = jax.device_put(params, sharding.weight_shardings(mesh, params))
    updates, state = jit(optimizer.update)(jax.tree.map(jnp.sin, params), state, params)
    _, expected = muon_steps(MUON)[0]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5), updates, expected
    )


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
    "values",
    [
        {"name": "sgd"},
        {"schedule": "step"},
        {"learning_rate": -1.0},
        {"grad_clip": -1.0},
        {"name": "muon", "learning_rate": 0.0},
        {"name": "muon", "adam_learning_rate": -1.0},
        {"name": "adam", "adam_learning_rate": 1e-3},
    ],
)
def test_bad_values_are_refused(values):
    with pytest.raises(UserError, match=r"config\.optimizer\."):
        OptimizerConfig(**values)
