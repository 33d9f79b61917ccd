"""Runs on disk as sampling needs them, of untrained networks."""

import json

import jax
from conftest import FakeEncoder, load_config, shrink, shrink_sr

from imagen_jax.config import parse
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.stage import Stage


def save_run(config, workdir):
    """Writes the config and a checkpoint of initial EMA weights; returns the workdir."""
    stage = Stage(parse(config))
    checkpoints = Checkpoints(workdir)
    state = {"ema": jax.jit(stage.init_params)()}
    checkpoints.save(1, state, {"examples": 0}, stage.config.identity)
    checkpoints.close()
    values = {**config.to_dict(), "model": dict(config.model)}
    (workdir / "config.json").write_text(json.dumps(values))
    return str(workdir)


def save_cascade(tmp_path_factory):
    """Returns the workdirs of a base model of 32 pixels and one that enlarges 32 to 64."""
    base, sr = shrink(load_config("demo")), shrink_sr(load_config("sr256", "tiny"))
    base.diffusion.prediction = "eps"  # untrained, it predicts 0: samples vary with seed and image
    return [
        save_run(base, tmp_path_factory.mktemp("base")),
        save_run(sr, tmp_path_factory.mktemp("sr")),
    ]


class ShortEncoder(FakeEncoder):
    """One token per character and an end token, six at most."""

    def num_tokens(self, caption):
        return len(caption) + 1

    def truncate(self, caption):
        return caption[: self.max_tokens - 1]
