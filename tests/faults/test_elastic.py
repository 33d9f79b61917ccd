"""A run goes on with another number of processes, and on another mesh, with the same losses."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest
from conftest import load_config, shrink
from faults import soak

from imagen_jax.config import parse
from imagen_jax.devices import sharding
from imagen_jax.devices.sharding import MeshConfig
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.training.experiment import build


@pytest.mark.slow
def test_a_killed_run_goes_on_with_two_processes_after_four_and_with_three_after_two(tmp_path):
    assert soak.elastic(2, num_steps=16, counts=(4, 2, 3), seed=5, folder=tmp_path) == []


@pytest.mark.slow
def test_a_state_is_restored_on_another_mesh_and_number_of_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 64)
    base = parse(shrink(load_config("demo", "unet")))

    def on(mesh, num):
        return build(dataclasses.replace(base, mesh=MeshConfig(**mesh)), jax.devices()[:num])

    first = on({"data": 1, "fsdp": 8}, 8)
    state = first.init()
    with contextlib.closing(Checkpoints(tmp_path, base.checkpoint)) as checkpoints:
        checkpoints.save(1, state, {"examples": 8}, base.identity)
    for mesh, num in (({"data": 2, "fsdp": 2, "tensor": 2}, 8), ({"fsdp": 4}, 4), ({}, 1)):
        other = on(mesh, num)
        with contextlib.closing(Checkpoints(tmp_path)) as checkpoints:
            found, position = checkpoints.restore(other.abstract_state, base.identity)
        assert position == {"examples": 8}
        jax.tree.map(np.testing.assert_array_equal, found, state)
        wanted = jax.tree.map(lambda x: x.sharding, other.abstract_state)
        assert jax.tree.map(lambda x: x.sharding, found) == wanted
