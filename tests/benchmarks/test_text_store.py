"""The store benchmark: exact padding, and a loss that depends only on the embeddings."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from conftest import random_batch

from benchmarks import text_store
from imagen_jax.config import parse
from imagen_jax.devices.sharding import MeshConfig, make_mesh
from imagen_jax.stage import Stage
from imagen_jax.text import encoder, load_encoder


def test_batching_by_length_reduces_padding():
    captions = ["a", "a red circle", "x" * 60]
    by_length, at_one = text_store.speeds(load_encoder("byte-tiny", 64), captions, 1).values()
    assert by_length[1] == pytest.approx(1 - 76 / (32 * (16 + 64)))
    assert at_one[1] == pytest.approx(1 - 76 / (32 * 61))
    assert by_length[0] > 0 and at_one[0] > 0
    assert encoder._bucket(1) == 16


def test_only_the_embeddings_change_the_loss(tiny_config):
    batches = [random_batch(tiny_config, seed) for seed in range(2)]
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    stage = Stage(parse(tiny_config.to_dict()), mesh)
    rng = np.random.default_rng(0)  # the initial network outputs zeros for any input
    params = jax.tree.map(
        lambda x: jax.device_put(x + 0.1 * rng.normal(size=x.shape).astype(x.dtype), x.sharding),
        stage.init_params(),
    )
    rows = text_store.losses(stage, params, batches)
    assert list(rows) == ["as encoded", "from bfloat16", "from int8", "none"]
    assert rows["from bfloat16"] == rows["as encoded"]
    assert 0 < abs(rows["from int8"].change) < abs(rows["none"].change)
