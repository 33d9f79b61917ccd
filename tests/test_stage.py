"""The held-out losses measure the network alone, without caption dropout or dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, random_batch, shrink

from imagen_jax.config import parse
from imagen_jax.diffusion.conditioning import drop_text
from imagen_jax.stage import Stage


@pytest.fixture(scope="module")
def config():
    return parse(shrink(load_config("demo", "unet")))


def variant(config, caption_dropout, dropout=0.0):
    diffusion = dataclasses.replace(config.diffusion, caption_dropout=caption_dropout)
    model = {**config.model, "dropout": dropout}
    return Stage(dataclasses.replace(config, diffusion=diffusion, model=model))


@pytest.fixture(scope="module")
def stages(config):
    """A stage without any dropout, one with both kinds, and one that only sees the null prompt."""
    return variant(config, 0.0), variant(config, 0.9, dropout=0.5), variant(config, 1.0)


@pytest.fixture(scope="module")
def params(stages):
    """Weights without zeros, so that the output depends on every input."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), stages[0].abstract_params
    )


@pytest.fixture(scope="module")
def losses(config, stages, params):
    return stages[0].held_out_losses(params, [random_batch(config, seed) for seed in range(2)])


def test_the_dropouts_of_training_do_not_change_the_held_out_losses(config, stages, params, losses):
    batches = [random_batch(config, seed) for seed in range(2)]
    assert stages[1].held_out_losses(params, batches) == losses
    assert losses["eval_loss"] != losses["eval_loss_null"]


def test_the_held_out_losses_are_training_losses_with_all_or_no_captions(
    config, stages, params, losses
):
    for stage, name in ((stages[0], "eval_loss"), (stages[2], "eval_loss_null")):
        loss = jax.jit(stage.loss)
        found = [
            loss(params, stage.put(random_batch(config, seed)), jax.random.key(seed))[0].mean()
            for seed in range(2)
        ]
        np.testing.assert_allclose(losses[name], np.mean(found), rtol=1e-5)


def test_the_held_out_losses_draw_times_uniformly_whatever_training_draws(config, params, losses):
    diffusion = dataclasses.replace(
        config.diffusion, time_sampling="log_snr_normal", time_mean=-2.5, time_std=0.01
    )
    stage = Stage(dataclasses.replace(config, diffusion=diffusion))
    batches = [random_batch(config, seed) for seed in range(2)]
    assert stage.held_out_losses(params, batches) == losses
    args = (params, stage.put(batches[0]), jax.random.key(0))
    log_snr_b = jax.jit(lambda *args: stage.loss(*args)[1])(*args)
    np.testing.assert_allclose(log_snr_b, -2.5, atol=0.05)


def test_the_null_loss_does_not_see_the_captions(config, stages, params, losses):
    changed = []
    for seed in range(2):
        batch = random_batch(config, seed)
        changed.append(jax.device_get(drop_text(batch, jnp.ones(config.batch_size, bool))))
    found = stages[0].held_out_losses(params, changed)
    assert found["eval_loss_null"] == losses["eval_loss_null"]
    assert found["eval_loss"] == pytest.approx(losses["eval_loss_null"], rel=1e-5)
