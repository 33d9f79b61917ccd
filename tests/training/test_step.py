"""The pure training step on a toy loss: microbatches, buckets, reproducibility."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imagen_jax.diffusion.loss import LOG_SNR_EDGES, bucket_names
from imagen_jax.training.step import accumulated_gradients, init_state, train_step


def toy_loss(params, batch, key):
    """A quadratic without randomness, so that microbatches do not change it."""
    del key
    error = batch["x"] @ params["w"] - batch["y"]
    return jnp.square(error), batch["log_snr"]


@pytest.fixture
def toy():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=3), jnp.float32)}
    batch = {
        "x": jnp.asarray(rng.normal(size=(12, 3)), jnp.float32),
        "y": jnp.asarray(rng.normal(size=12), jnp.float32),
        "log_snr": jnp.linspace(-10, 10, 12),
    }
    return params, batch


@pytest.mark.parametrize("microbatches", [2, 3, 12])
def test_microbatches_average_to_the_whole_batch(toy, microbatches):
    params, batch = toy
    key = jax.random.key(0)
    whole, whole_metrics = accumulated_gradients(toy_loss, params, batch, key, 1)
    parts, parts_metrics = accumulated_gradients(toy_loss, params, batch, key, microbatches)
    np.testing.assert_allclose(parts["w"], whole["w"], rtol=1e-5)
    for name in whole_metrics:
        np.testing.assert_allclose(parts_metrics[name], whole_metrics[name], rtol=1e-5)


def test_each_loss_is_in_one_bucket(toy):
    params, batch = toy
    _, metrics = accumulated_gradients(toy_loss, params, batch, jax.random.key(0), 1)
    loss_b, log_snr_b = toy_loss(params, batch, None)
    edges = [-np.inf, *LOG_SNR_EDGES, np.inf]
    for i, (low, high) in enumerate(itertools.pairwise(edges)):
        inside = (np.asarray(log_snr_b) > low) & (np.asarray(log_snr_b) <= high)
        assert metrics["bucket_count"][i] == inside.sum()
        np.testing.assert_allclose(
            metrics["bucket_loss"][i], np.asarray(loss_b)[inside].sum(), rtol=1e-5
        )
    assert len(bucket_names()) == len(LOG_SNR_EDGES) + 1


def noisy_loss(params, batch, key):
    noise = jax.random.normal(key, batch["y"].shape)
    return jnp.square(batch["x"] @ params["w"] - noise), batch["log_snr"]


def test_randomness_depends_only_on_the_seed_and_the_step(toy):
    params, batch = toy
    optimizer = optax.sgd(0.1)
    step = functools.partial(train_step, loss_fn=noisy_loss, optimizer=optimizer, ema_decay=0.9)
    state = init_state(params, optimizer)
    first, metrics = step(state, batch, seed=1)
    again, _ = step(state, batch, seed=1)
    np.testing.assert_array_equal(first.params["w"], again.params["w"])
    _, other_seed = step(state, batch, seed=2)
    _, other_step = step(first, batch, seed=1)
    losses = {float(m["loss"]) for m in (metrics, other_seed, other_step)}
    assert len(losses) == 3
    assert int(first.step) == 1
    # The decay at step 0 is min(0.9, 1/10).
    expected = 0.1 * params["w"] + 0.9 * first.params["w"]
    np.testing.assert_allclose(first.ema["w"], expected, rtol=1e-5)


@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_only_the_step_counter(toy, where, microbatches):
    params, batch = toy
    optimizer = optax.adam(1e-2)
    options = {"loss_fn": toy_loss, "optimizer": optimizer, "ema_decay": 0.9, "seed": 0}
    step = functools.partial(train_step, microbatches=microbatches, **options)
    state, metrics = step(init_state(params, optimizer), batch)
    assert not metrics["skipped"]
    bad = {"y": batch["y"].at[4].set(1e25)}  # its square is infinite
    if where == "gradient":  # a finite loss, but the root of 0 has no gradient
        options["loss_fn"] = lambda p, b, k: (jnp.sqrt(jnp.abs(p["w"].sum() * b["zero"])), b["y"])
        step = functools.partial(train_step, microbatches=microbatches, **options)
        bad = {"zero": jnp.zeros(12)}
    after, metrics = step(state, batch | bad)
    assert metrics["skipped"] and bool(jnp.isfinite(metrics["loss"])) == (where == "gradient")
    assert after.step == state.step + 1
    for name in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(state, name))
