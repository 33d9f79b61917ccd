"""An experiment learns, repeats exactly, and gives the same losses on every mesh."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import load_config, random_batch, shrink

from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.devices.sharding import bytes_per_device
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.training.experiment import build


def run(config, steps=3, devices=None):
    """Trains a few steps on random batches; returns (losses, state, experiment)."""
    experiment = build(config, devices)
    state = experiment.init()
    losses = []
    for step in range(steps):
        state, metrics = experiment.step(
            state, experiment.stage.put(random_batch(experiment.config, step))
        )
        losses.append(float(metrics["loss"]))
    return losses, state, experiment


@pytest.fixture(scope="module")
def config():
    return parse(shrink(load_config("demo", "unet")))


@pytest.fixture(scope="module")
def one_device(config):
    """(losses, state, experiment) after three steps on one device."""
    return run(config, devices=jax.devices()[:1])


def test_same_config_and_seed_give_the_same_losses_bit_for_bit(config, one_device):
    losses, _, experiment = one_device
    state = experiment.init()
    again = []
    for step in range(3):
        state, metrics = experiment.step(state, experiment.stage.put(random_batch(config, step)))
        again.append(float(metrics["loss"]))
    assert again == losses
    assert len(set(losses)) == 3


@pytest.mark.parametrize(
    "mesh", [{"data": 8}, {"fsdp": 2, "data": 4, "remat": "block"}], ids=["data", "fsdp-remat"]
)
def test_every_mesh_gives_the_losses_of_one_device(config, one_device, mesh, monkeypatch):
    # By default the arrays of a tiny model are too small to shard.
    monkeypatch.setattr("imagen_jax.devices.sharding.MIN_SHARDED_SIZE", 1)
    sharded = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **mesh))
    many, state, experiment = run(sharded)
    np.testing.assert_allclose(many, one_device[0], rtol=1e-5)
    if mesh.get("fsdp", 1) > 1:
        assert (
            bytes_per_device(experiment.abstract_state)
            < sum(x.nbytes for x in jax.tree.leaves(state)) * 0.6
        )


def test_the_loss_falls_on_one_batch(one_device):
    _, _, experiment = one_device
    batch = random_batch(experiment.config)
    batch["image"][:] = 200  # random pixels cannot be learned
    state, batch, key = experiment.init(), experiment.stage.put(batch), jax.random.key(0)
    before = float(experiment.stage.eval_loss(state.params, batch, key, False))
    for _ in range(30):
        state, _ = experiment.step(state, batch)
    assert float(experiment.stage.eval_loss(state.params, batch, key, False)) < 0.8 * before
    # The EMA follows the weights.
    assert float(experiment.stage.eval_loss(state.ema, batch, key, False)) < 0.9 * before


def test_a_sample_depends_on_its_seed_and_prompt_not_on_its_batch(config, one_device):
    _, state, experiment = one_device
    batch = random_batch(config)
    cond = {k: batch[k] for k in ("text", "text_mask")}
    seeds = np.arange(8, dtype=np.uint32)
    together = experiment.stage.sample(state.params, seeds, cond)
    assert together.shape == (8, 32, 32, 3) and together.dtype == np.uint8
    one = experiment.stage.sample(state.params, seeds[5:6], {k: v[5:6] for k, v in cond.items()})
    assert np.abs(one[0].astype(int) - together[5].astype(int)).max() <= 1
    chunked = experiment.stage.sample(state.params, seeds, cond, batch_size=3)
    assert np.abs(chunked.astype(int) - together.astype(int)).max() <= 1


def test_config_json_restores_the_same_config(config):
    written = json.loads(json.dumps(dataclasses.asdict(config)))
    again = parse(written)
    assert again.unet == config.unet and again.identity == config.identity
    assert dataclasses.replace(again, model=config.model) == config


def test_a_checkpoint_that_lacks_a_weight_is_refused(config, one_device, tmp_path):
    _, state, experiment = one_device
    state = jax.tree.map(lambda x: x, state)  # copies the dicts
    del state.params["head"], state.ema["head"]
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(3, state, {"examples": 0}, config.identity)
    checkpoints.wait()
    with pytest.raises(UserError, match=r"by another version of this network: it has no ema\.head"):
        checkpoints.restore_ema(experiment.abstract_state.ema, config.identity)
    with pytest.raises(UserError, match=r"it has no (ema|params)\.head"):
        checkpoints.restore(experiment.abstract_state, config.identity)
    checkpoints.close()


def test_a_checkpoint_restores_on_another_mesh_but_not_into_another_model(
    config, one_device, tmp_path
):
    _, state, _ = one_device
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(3, state, {"examples": 24}, config.identity)
    checkpoints.wait()

    mesh = dataclasses.replace(config.mesh, data=2, fsdp=4)
    other = build(dataclasses.replace(config, mesh=mesh))
    restored, position = checkpoints.restore(other.abstract_state, config.identity)
    assert position == {"examples": 24}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(restored.params))

    wider = dataclasses.replace(config, model={**config.model, "embed_dim": 16})
    with pytest.raises(UserError, match=r"another model: config\.model\.embed_dim is 16.* has 8"):
        checkpoints.restore(other.abstract_state, wider.identity)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        checkpoints.restore(other.abstract_state, config.identity, step=7)
    checkpoints.close()


@pytest.mark.slow
def test_a_run_with_muon_learns_and_resumes_exactly(config, tmp_path):
    optimizer = dataclasses.replace(
        config.optimizer, name="muon", learning_rate=0.02, adam_learning_rate=2e-3, weight_decay=0.0
    )
    config = dataclasses.replace(config, optimizer=optimizer)
    losses, state, experiment = run(config, steps=3, devices=jax.devices()[:1])
    assert np.isfinite(losses).all()
    checkpoints = Checkpoints(tmp_path, config.checkpoint)
    checkpoints.save(3, state, {"examples": 24}, config.identity)
    checkpoints.wait()
    restored, _ = checkpoints.restore(experiment.abstract_state, config.identity)
    checkpoints.close()
    batch = experiment.stage.put(random_batch(config, 4))
    expected, _ = experiment.step(state, batch)
    found, _ = experiment.step(restored, batch)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), jax.device_get(expected))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("batch_size", 12, "batch_size is 12; it must be a multiple of 8"),
        ("num_steps", 0, "num_steps is 0"),
        ("ema_decay", 1.0, "ema_decay is 1.0"),
        ("model.embed_dimm", 64, "did you mean model.embed_dim"),
        ("model.per_head_channels", 5, "model.per_head_channels is 5"),
        ("diffusion.schedule", "cosin", "diffusion.schedule is 'cosin'; allowed: cosine"),
        ("diffusion.caption_dropout", 1.5, "diffusion.caption_dropout is 1.5"),
        ("optimizer.name", "sgd", "optimizer.name is 'sgd'"),
        ("mesh.data", 3, "must multiply to 8 devices"),
        ("sampling.guidance_weight", -1.0, "sampling.guidance_weight is -1.0"),
        ("text.pooling", "max", "config.text.pooling is 'max'; allowed: attention"),
    ],
)
def test_bad_values_are_one_line_errors(tiny_config, key, value, words):
    values = tiny_config.to_dict()
    section, _, last = key.rpartition(".")
    (values.setdefault(section, {}) if section else values)[last] = value
    with pytest.raises(UserError) as e:
        build(values)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_the_paper_scale_experiment_is_built_without_memory():
    experiment = build(parse(load_config("base64")), jax.devices()[:1])
    assert experiment.config.unet.image_size == 64
    assert experiment.stage.num_params == 1_988_589_571
