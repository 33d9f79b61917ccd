"""Runs on disk as sampling needs them, of networks with random weights."""

import json

import jax
import numpy as np
from conftest import FakeEncoder, load_config, shrink, shrink_sr

from imagen_jax.config import parse
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.stage import Stage


def random_params(stage):
    """Weights without the zeros of an initialization, so that samples depend on every input."""
    rng = np.random.default_rng(0)

    def leaf(x):
        values = (0.1 * rng.standard_normal(x.shape)).astype(x.dtype)
        return jax.device_put(values, x.sharding)

    return jax.tree.map(leaf, stage.abstract_params)


def save_run(config, workdir):
    """Writes the config and a checkpoint of random EMA weights; returns the workdir."""
    stage = Stage(parse(config))
    checkpoints = Checkpoints(workdir, stage.config.checkpoint)
    state = {"ema": random_params(stage)}
    checkpoints.save(1, state, {"examples": 0}, stage.config.identity)
    checkpoints.close()
    values = {**config.to_dict(), "model": dict(config.model)}
    (workdir / "config.json").write_text(json.dumps(values))
    return str(workdir)


def save_cascade(tmp_path_factory):
    """Returns the workdirs of a base model of 32 pixels and one that enlarges 32 to 64."""
    return [
        save_run(shrink(load_config("demo", "unet")), tmp_path_factory.mktemp("base")),
        save_run(shrink_sr(load_config("sr256", "tiny")), tmp_path_factory.mktemp("sr")),
    ]


class ShortEncoder(FakeEncoder):
    """One token per character and an end token, six at most."""

    def num_tokens(self, caption):
        return len(caption) + 1

    def truncate(self, caption):
        return caption[: self.max_tokens - 1]
