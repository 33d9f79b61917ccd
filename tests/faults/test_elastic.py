"""A run goes on with another number of processes, and on another mesh, with the same losses."""

import contextlib
import dataclasses
import json
import os
import random
import subprocess
import sys
import time
from collections import defaultdict

import jax
import numpy as np
import pytest
from conftest import ROOT, load_config, shrink
from faults import soak

from imagen_jax.config import parse
from imagen_jax.devices import sharding
from imagen_jax.devices.sharding import MeshConfig
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.training.experiment import build
from launch import local

# Small weights are sharded too.
CONFIG = (
    """
from imagen_jax.devices import sharding

assert sharding.MIN_SHARDED_SIZE
sharding.MIN_SHARDED_SIZE = 64
"""
    + soak.CONFIG
)
STEPS, BATCH, RECORDS = 16, 12, 40


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A config file of batches that 4, 2 and 3 processes can share."""
    path = soak.make_config(tmp_path_factory.mktemp("elastic"), STEPS, in_memory=False)
    values = json.loads(path.with_suffix(".json").read_text())
    values.update(batch_size=BATCH, microbatches=1, log_every=1, checkpoint_every=2)
    values.update(eval_every=0, sample_every=0, mesh={"data": 1, "fsdp": -1})
    values["checkpoint"] = {"every_s": 0.1}  # all processes must agree when to save
    path.with_suffix(".json").write_text(json.dumps(values))
    path.write_text(CONFIG)
    return path


def start(config, workdir, count):
    """Starts the processes of a run."""
    env = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(config.parent / "xla"),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # one device each
        soak.BATCHES: str(workdir.with_suffix(".batches")),
        soak.EXAMPLES: str(workdir.with_suffix(".examples")),
        soak.DELAY: "0.3",
    }
    command = [sys.executable, "-m", "tests.faults.soak", "--child", f"--config={config}"]
    command += [f"--workdir={workdir}", "--heartbeat_timeout=10"]
    if count > 1:
        command += [f"--coordinator=localhost:{local.free_port()}", f"--num_processes={count}"]
    with workdir.with_suffix(".log").open("a") as log:
        return [
            subprocess.Popen(
                [*command, *([f"--process_id={i}"] if count > 1 else [])],
                stdout=log, stderr=log, cwd=ROOT, env=env,
            )
            for i in range(count)
        ]  # fmt: skip


def losses(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    found = [json.loads(line) for line in lines]
    return {line["step"]: line["loss"] for line in found if "loss" in line}


def run_and_kill(config, workdir, count, step, rng):
    """Runs until `step`, then kills one process; the others must end by themselves."""
    running = start(config, workdir, count)
    try:
        while max(losses(workdir), default=0) < step:
            assert all(p.poll() is None for p in running), workdir.with_suffix(".log").read_text()
            time.sleep(0.05)
        rng.choice(running).kill()
        for process in running:
            assert process.wait(timeout=300) != 0
    finally:
        for process in running:
            process.kill()


@pytest.mark.slow
def test_a_killed_run_goes_on_with_two_processes_after_four_and_with_three_after_two(
    config, tmp_path
):
    rng, many, one = random.Random(0), tmp_path / "many", tmp_path / "one"
    run_and_kill(config, many, 4, 4, rng)
    run_and_kill(config, many, 2, 9, rng)
    for workdir, count in ((many, 3), (one, 1)):
        for process in start(config, workdir, count):
            assert process.wait(timeout=900) == 0, workdir.with_suffix(".log").read_text()
    assert sorted(losses(many)) == list(range(1, STEPS + 1))
    assert losses(many) == pytest.approx(losses(one), rel=0, abs=1e-5)

    read = defaultdict(set)  # (epoch, position) -> the examples that were ever read there
    for line in many.with_suffix(".examples").read_text().splitlines():
        epoch, position, index = map(int, line.split())
        read[epoch, position].add(index)
    assert all(len(found) == 1 for found in read.values())
    for epoch in range(STEPS * BATCH // RECORDS):
        seen = [min(found) for (e, _), found in read.items() if e == epoch]
        assert sorted(seen) == list(range(RECORDS)), f"epoch {epoch}"


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
