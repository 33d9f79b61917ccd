"""A warm start takes what fits from another run, says what it left out, and never takes nothing."""

import contextlib
import dataclasses

import exports
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, shrink, shrink_transformer
from saved_runs import random_params

from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.runs import exported, warm_start
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.workdir import write_config
from imagen_jax.sections import InitConfig
from imagen_jax.stage import Stage
from imagen_jax.training import resume
from imagen_jax.training.experiment import build


def tiny(**changes):
    config = parse(shrink(load_config("demo", "unet")))
    return dataclasses.replace(config, model={**config.model, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A run whose raw weights are the EMA plus 1; returns its workdir and the EMA by name."""
    workdir, config = tmp_path_factory.mktemp("source"), tiny()
    ema = random_params(Stage(config))
    raw = jax.tree.map(lambda x: x + 1, ema)
    with contextlib.closing(Checkpoints(workdir, config.checkpoint)) as checkpoints:
        for step in (1, 2):
            state = {"ema": ema, "params": raw if step == 2 else ema}
            checkpoints.save(step, state, {"examples": 0}, config.identity)
    write_config(workdir, config)
    return workdir, exported.flat_names(ema)


def started(config, **init):
    """The weights that a network full of 0.5 gets, by name."""
    config = dataclasses.replace(config, init=InitConfig(**init))
    shapes = Stage(config).abstract_params
    fresh = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype, device=x.sharding), shapes)
    return exported.flat_names(warm_start.load(config, fresh))


@pytest.mark.parametrize(
    ("step", "weights", "shift"), [("", "ema", 0), ("", "raw", 1), (":1", "raw", 0)]
)
def test_the_same_network_starts_from_the_ema_or_the_raw_weights(source, step, weights, shift):
    workdir, saved = source
    params = started(tiny(), workdir=f"{workdir}{step}", weights=weights)
    assert params.keys() == saved.keys()
    for name, value in saved.items():
        np.testing.assert_array_equal(params[name], value + shift)


def test_an_exported_model_is_a_source(source, tmp_path):
    workdir, saved = source
    with exports.defined_flags():
        out = exports.call(tmp_path / "out", f"--workdir={workdir}")
    params = started(tiny(), workdir=str(out))
    for name, value in saved.items():
        np.testing.assert_array_equal(params[name], value)
    with pytest.raises(UserError, match=r"^config.init.weights is 'raw'; allowed: ema, because"):
        started(tiny(), workdir=str(out), weights="raw")


def test_arrays_of_another_shape_stay_random_and_are_listed(source, caplog):
    workdir, saved = source
    config = tiny()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, dim=12))
    with caplog.at_level("INFO", logger="imagen_jax"):
        params = started(config, workdir=str(workdir))
    changed = "conditioner.text.kernel"
    for name, value in saved.items():
        np.testing.assert_array_equal(params[name], 0.5 if name == changed else value)
    assert f"{len(saved) - 1} arrays loaded, 0 reshaped, 1 skipped" in caplog.text
    assert "config.text.dim is 8 there and 12 here" in caplog.text
    assert f"skipped  {changed}: 8x128 there, 12x128 here; another shape" in caplog.text


def test_new_input_channels_of_a_super_resolution_model_start_at_zero(source, caplog):
    workdir, saved = source
    with caplog.at_level("INFO", logger="imagen_jax"):
        params = started(tiny(low_res=16), workdir=str(workdir))
    folded = np.asarray(params["stem.kernel"]).reshape(3, 3, 16, 6, -1)  # patches of 4 x 4
    there = np.asarray(saved["stem.kernel"]).reshape(3, 3, 16, 3, -1)
    np.testing.assert_array_equal(folded[:, :, :, :3], there)
    assert not folded[:, :, :, 3:].any()
    assert f"{len(saved) - 1} arrays loaded, 1 reshaped" in caplog.text
    assert "skipped  conditioner.aug." in caplog.text and "not there" in caplog.text


def test_a_regular_expression_chooses_arrays(source):
    workdir, saved = source
    params = started(tiny(), workdir=str(workdir), only="^conditioner")
    for name, value in saved.items():
        chosen = value if name.startswith("conditioner") else 0.5
        np.testing.assert_array_equal(params[name], chosen)


def test_what_would_load_nothing_is_refused(source, tmp_path):
    workdir, _ = source
    with pytest.raises(UserError, match=r"init\.only is 'decoder', which matches no array here"):
        started(tiny(), workdir=str(workdir), only="decoder")
    other = parse(shrink_transformer(load_config("transformer64")))
    with pytest.raises(
        UserError, match=r"none of its \d+ arrays .* 'unet' there and 'transformer'"
    ):
        started(other, workdir=str(workdir), only="^blocks")
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; found \[1, 2\]"):
        started(tiny(), workdir=f"{workdir}:7")
    with pytest.raises(UserError, match=r"holds no run \(config.json is missing\)"):
        warm_start.check_source(InitConfig(workdir=str(tmp_path / "none")), tmp_path)
    warm_start.check_source(InitConfig(workdir=f"{workdir}:2"), tmp_path)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"workdir": "w", "weights": "best"}, r"init\.weights is 'best'; allowed: ema, raw"),
        ({"workdir": "w", "only": "("}, r"init\.only is '\('; allowed: a regular expression"),
        ({"only": "a"}, r"init\.only is 'a'; allowed: '' without workdir"),
    ],
)
def test_bad_keys_are_refused(values, words):
    with pytest.raises(UserError, match=words):
        InitConfig(**values)


def test_the_workdir_may_name_a_step():
    assert InitConfig("a/b:12").source == ("a/b", 12)
    assert InitConfig("a/b:c").source == ("a/b:c", None)
    assert InitConfig("a/b").source == ("a/b", None)


def test_a_run_starts_from_its_own_checkpoint_else_from_the_other_run(source, tmp_path):
    workdir, saved = source
    config = dataclasses.replace(tiny(), init=InitConfig(workdir=str(workdir)))
    experiment = build(config)
    state = resume.initial_state(experiment)
    assert state.step == 0
    for tree in (state.params, state.ema):
        jax.tree.map(np.testing.assert_array_equal, exported.flat_names(tree), saved)
    own = experiment.init()
    with contextlib.closing(Checkpoints(tmp_path, config.checkpoint)) as checkpoints:
        checkpoints.save(3, own, {"examples": 24}, config.identity)
        checkpoints.wait()
        state, position = resume.start_or_resume(experiment, checkpoints)
    assert position == {"examples": 24}
    jax.tree.map(np.testing.assert_array_equal, state.params, own.params)
