"""Every mesh trains to the same losses; a topology chooses mesh, remat and batch."""

import dataclasses
import functools
import types

import jax
import numpy as np
import pytest
from conftest import load_config, random_batch, shrink, shrink_sr, shrink_transformer

from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.devices import memory, sharding, topologies
from imagen_jax.devices.sharding import MeshConfig, make_mesh, weight_shardings
from imagen_jax.training.experiment import Experiment, build

STEPS = 20
STAGES = {
    "base64": shrink,
    "sr256": shrink_sr,
    "sr1024": shrink_sr,
    "transformer64": shrink_transformer,
}
slow = pytest.mark.slow
MESHES = [
    {"data": 2, "fsdp": 2, "tensor": 2, "remat": "block"},
    pytest.param({"data": 8}, marks=slow),
    pytest.param({"fsdp": 8, "data": 1, "remat": "offload"}, marks=slow),
    pytest.param({"data": 4, "fsdp": 1, "tensor": 2}, marks=slow),
    pytest.param({"data": 1, "fsdp": 8, "remat": "none"}, marks=slow),
    pytest.param({"data": 2, "fsdp": 4, "remat": "save_products"}, marks=slow),
    pytest.param(
        {"topology": "v4-8", "slice": 2, "fsdp": 4, "remat": "save_attention"}, marks=slow
    ),
]


def name(mesh):
    return "-".join(f"{k}{v}" for k, v in mesh.items())


def config_of(config_name, **mesh):
    config = parse(STAGES[config_name](load_config(config_name)))
    return dataclasses.replace(config, mesh=MeshConfig(**mesh), device_batch=0, microbatches=1)


def losses(config, devices=None):
    """Losses of the first steps, and the experiment."""
    experiment = build(config, devices)
    state, out = experiment.init(), []
    for step in range(STEPS):
        state, metrics = experiment.step(state, experiment.stage.put(random_batch(config, step)))
        out.append(metrics["loss"])
    return np.array(jax.device_get(out)), experiment


@functools.cache
def on_one_device(config_name):
    return losses(config_of(config_name), jax.devices()[:1])[0]


@pytest.mark.parametrize("mesh", MESHES, ids=name)
@pytest.mark.parametrize(
    "config_name", ["base64", *(pytest.param(s, marks=slow) for s in STAGES if s != "base64")]
)
def test_losses_match_those_of_one_device(config_name, mesh, monkeypatch):
    # Every weight of a tiny model is below the default size.
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    found, experiment = losses(config_of(config_name, **mesh))
    np.testing.assert_allclose(found, on_one_device(config_name), rtol=1e-5)
    assert len(set(found.tolist())) == STEPS
    specs = {axis for x in jax.tree.leaves(experiment.abstract_state) for axis in x.sharding.spec}
    split = {axis for axis in ("fsdp", "tensor") if mesh.get(axis, 1) > 1}
    assert specs - {None} == split


def spec(shape, **axes):
    x = jax.ShapeDtypeStruct(shape, np.float32)
    return tuple(weight_shardings(make_mesh(MeshConfig(data=1, **axes)), x).spec)


def test_tensor_shards_output_channels_and_fsdp_shards_whole_tiles():
    assert spec((3, 3, 512, 1024), fsdp=4, tensor=2) == (None, None, "fsdp", "tensor")
    assert spec((3, 3, 512, 1024), fsdp=8) == (None, None, None, "fsdp")
    # A shard of 960 columns is narrower than a tile, 128; a shard of 128 rows has 16.
    assert spec((128, 960), fsdp=8) == ("fsdp", None)
    assert spec((24, 3072), fsdp=8) == (None, "fsdp")
    # Too small, or not divisible.
    assert spec((64, 64), fsdp=8) == ()
    assert spec((3, 3, 3, 9999), fsdp=8) == (None,) * 4


def test_fsdp_0_is_64_on_large_slices_and_up_to_8_elsewhere():
    def sizes(devices, **axes):
        return tuple(MeshConfig(fsdp=0, **axes).sizes(devices).values())

    assert sizes(4) == (1, 1, 4, 1)
    assert sizes(16) == (1, 2, 8, 1)
    assert sizes(32) == (1, 4, 8, 1)
    assert sizes(64) == (1, 8, 8, 1)
    assert sizes(128) == (1, 2, 64, 1)
    assert sizes(256) == (1, 4, 64, 1)
    assert sizes(2048, tensor=2) == (1, 16, 64, 2)
    assert sizes(512, slice=2) == (2, 4, 64, 1)


@pytest.mark.parametrize(
    ("platform", "devices", "batch", "ways"),
    [("tpu", 256, 2048, 1), ("tpu", 512, 2048, 2), ("tpu", 1024, 2048, 4), ("tpu", 2048, 2048, 4),
     ("tpu", 2, 1, 2), ("tpu", 1, 4, 1), ("gpu", 8, 8, 1)],
)  # fmt: skip
def test_tensor_0_gives_each_tpu_8_examples_and_is_1_elsewhere(platform, devices, batch, ways):
    several = [types.SimpleNamespace(platform=platform)] * devices
    found = memory.fill_tiles(MeshConfig(tensor=0), batch, 0, several)
    assert found == MeshConfig(tensor=ways)
    assert memory.fill_tiles(MeshConfig(tensor=8), batch, 0, several).tensor == 8


def test_tensor_0_respects_microbatches_and_axes_of_a_fixed_size():
    def tensor(batch=2048, microbatches=0, **axes):
        several = [types.SimpleNamespace(platform="tpu")] * 512
        return memory.fill_tiles(MeshConfig(tensor=0, **axes), batch, microbatches, several).tensor

    assert tensor() == 2 and tensor(microbatches=2) == 4 and tensor(batch=4096) == 1
    assert tensor(data=8, fsdp=64) == tensor(fsdp=512) == 1
    assert tensor(data=4, fsdp=64) == 2 and tensor(slice=256) == 2


def test_pairs_of_chips_share_examples_on_a_large_slice():
    pytest.importorskip("libtpu")
    config = parse(load_config("base64"))
    mesh = dataclasses.replace(config.mesh, topology="v4-1024")
    devices = topologies.devices(topologies.lookup("v4-1024"))
    experiment = Experiment(dataclasses.replace(config, mesh=mesh), devices)
    assert dict(experiment.mesh.shape) == {"slice": 1, "data": 4, "fsdp": 64, "tensor": 2}
    assert experiment.compiler_options == {"xla_enable_async_all_gather": True}


@pytest.mark.parametrize(
    ("room", "remat", "count"),
    [
        (1.0, "none", 8),
        (2.01, "none", 4),
        (0.99, "none", 16),
        (0.99, "block", 8),
        (0.1, "none", 64),
    ],
)
def test_a_device_with_more_room_runs_more_examples_at_once(room, remat, count):
    mesh = make_mesh(MeshConfig())
    found = memory.count_microbatches(mesh, 512, 8, room * memory.ROOM["kept"], remat)
    assert found == count


def test_the_number_of_microbatches_divides_the_batch():
    mesh = make_mesh(MeshConfig())
    assert memory.count_microbatches(mesh, 8 * 12, 5, memory.ROOM["kept"], "none") == 3


@pytest.mark.parametrize(
    ("config_name", "topology", "remat", "microbatches"),
    [
        ("base64", "v4-8", "none", 2048 // 4 // 16),
        ("base64", "v5e-4", "block", 2048 // 4 // 8),  # state and gradients take 8 of 16 GiB
        ("base64", "v5e-8", "none", 2048 // 8 // 8),
        ("base64:1b", "v5e-8", "none", 2048 // 8 // 8),
        ("sr256", "v5e-8", "none", 2048 // 8 // 16),
    ],
)
def test_a_topology_sets_mesh_remat_and_microbatches(config_name, topology, remat, microbatches):
    config = parse(load_config(*config_name.split(":")))
    mesh = dataclasses.replace(config.mesh, topology=topology)
    chips = topologies.lookup(topology).num_chips
    experiment = build(dataclasses.replace(config, mesh=mesh), jax.devices()[:chips])
    assert (experiment.remat, experiment.microbatches) == (remat, microbatches)
    assert experiment.mesh.shape["fsdp"] == chips


def test_a_topology_must_match_the_number_of_devices():
    with pytest.raises(UserError, match="'v4-512', 256 chips; here are 8 device"):
        build(config_of("base64", topology="v4-512"))
    with pytest.raises(UserError, match="v4-7"):
        build(config_of("base64", topology="v4-7"))


def test_a_topology_must_match_the_kind_of_chip():
    pytest.importorskip("libtpu")
    devices = topologies.devices(topologies.lookup("v5e-4"))
    with pytest.raises(UserError, match="is 'v4-8', of TPU v4; here are TPU v5 lite"):
        build(config_of("base64", topology="v4-8"), devices)


def test_blocks_are_recomputed_if_too_many_examples_run_at_once():
    config = parse(load_config("base64"))
    mesh = dataclasses.replace(config.mesh, topology="v4-8")
    for parts, remat in ((64, "none"), (16, "block")):
        asked = dataclasses.replace(config, mesh=mesh, microbatches=parts)
        experiment = build(asked, jax.devices()[:4])
        assert (experiment.remat, experiment.microbatches) == (remat, parts)


def test_several_slices_must_match_the_number_of_devices():
    experiment = build(config_of("base64", topology="v4-8", slice=2, fsdp=0))
    assert tuple(experiment.mesh.shape.values()) == (2, 1, 4, 1)
    with pytest.raises(UserError, match=r"'v4-8' and config.mesh.slice 4, 16 chips; here are 8"):
        build(config_of("base64", topology="v4-8", slice=4))
    with pytest.raises(UserError, match=r"config.mesh.slice is -1; allowed: a positive number"):
        config_of("base64", topology="v4-8", slice=-1, data=1)


@pytest.fixture
def two_slices():
    pytest.importorskip("libtpu")
    return topologies.devices(topologies.lookup("v4-16", 2))


def test_each_index_of_the_slice_axis_is_one_slice(two_slices):
    mesh = make_mesh(MeshConfig(slice=2, fsdp=0), two_slices)
    for index, devices in enumerate(mesh.devices):
        assert {d.slice_index for d in devices.flat} == {index}
    for slices in (1, 4):
        words = f"config.mesh.slice is {slices}; the 16 devices form 2 slice"
        with pytest.raises(UserError, match=words):
            make_mesh(MeshConfig(slice=slices), two_slices)


@pytest.mark.parametrize(("tensor", "shares"), [(1, 4), (2, 4), (4, 4), (8, 2)])
def test_hosts_that_share_examples_read_the_same_rows(tensor, shares, two_slices, monkeypatch):
    mesh = make_mesh(MeshConfig(slice=2, tensor=tensor), two_slices)
    found = []
    for host in range(4):
        monkeypatch.setattr(jax, "process_index", lambda host=host: host)
        found.append(sharding.batch_share(mesh))
    assert sorted(found) == sorted((host * shares // 4, shares) for host in range(4))


def test_one_host_reads_all_rows():
    assert sharding.batch_share(make_mesh(MeshConfig(data=4, tensor=2))) == (0, 1)
