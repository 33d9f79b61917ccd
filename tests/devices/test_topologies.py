"""A slice's name gives its shape, and an unknown name is refused with the names that exist."""

import importlib.util
import os
import subprocess
import sys
import types

import jax
import pytest
from conftest import ROOT

from imagen_jax.common.errors import UserError
from imagen_jax.devices import topologies

EVERY = [
    f"{family}-{chips * chip.cores}"
    for family, (chip, shapes) in topologies.FAMILIES.items()
    for chips in shapes
]


@pytest.mark.parametrize(
    ("name", "shape", "chips", "hosts"),
    [
        ("v4-8", "2x2x1", 4, 1),
        ("v4-512", "4x8x8", 256, 64),
        ("v4-4096", "8x16x16", 2048, 512),
        ("v5p-128", "4x4x4", 64, 16),
        ("v5litepod-8", "2x4", 8, 1),
        ("v5e-256", "16x16", 256, 64),
        ("v5litepod-256", "16x16", 256, 64),
        ("v6e-16", "4x4", 16, 4),
        ("cpu", "1", 1, 1),
        ("gpu", "1", 1, 1),
    ],
)
def test_a_name_gives_its_shape(name, shape, chips, hosts):
    found = topologies.lookup(name)
    assert (found.shape, found.num_chips, found.num_hosts) == (shape, chips, hosts)


def test_both_names_of_a_v5e_are_one_topology():
    found = topologies.lookup("v5e-16")
    assert found == topologies.lookup("v5litepod-16") and found.name == "v5litepod-16"


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_only_a_tpu_slice_can_be_rented(name):
    with pytest.raises(UserError, match=f"--type is '{name}'; allowed: v4-N.*v6e-N \\("):
        topologies.tpu_slice(name)


@pytest.mark.parametrize("name", EVERY)
def test_every_shape_fits_the_number_in_its_name(name):
    found = topologies.lookup(name)
    assert found.num_chips * found.chip.cores == int(name.rpartition("-")[2])
    assert found.num_chips == 1 or found.links > 0


def test_several_slices_add_up_on_tpus_only():
    found = topologies.lookup("v4-512", 2)
    assert (found.label, found.shape, found.slice_chips) == ("2 x v4-512", "4x8x8", 256)
    assert (found.num_chips, found.num_hosts) == (512, 128)
    with pytest.raises(UserError, match=r"config.mesh.slice is 2; allowed on gpu: 1"):
        topologies.lookup("gpu", 2)


@pytest.mark.parametrize(
    ("name", "links"), [("v4-8", 2), ("v4-64", 3), ("v4-512", 6), ("v5e-16", 2), ("v5e-256", 4)]
)
def test_a_torus_has_more_links_than_a_mesh(name, links):
    found = topologies.lookup(name)
    assert found.links == links
    assert found.ici_bytes_per_s == links * 50e9


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        ("v4-500", "v4-512"),
        ("v4-7", "v4-8"),
        ("v6e-512", "v6e-256"),
        ("v5e-7", "v5litepod-8"),
        ("v9-8", "v5e-N, v5litepod-N"),
        ("tpu", "v6e-N"),
        ("", "cpu"),
    ],
)
def test_an_unknown_name_is_refused_with_those_that_exist(name, allowed):
    with pytest.raises(UserError, match=allowed) as e:
        topologies.lookup(name)
    assert repr(name) in str(e.value) and "\n" not in str(e.value)


def test_tpu_devices_need_libtpu(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "libtpu" else find(name, *a)
    )
    with pytest.raises(UserError, match=r"libtpu.*\[plan\]"):
        topologies.devices(topologies.lookup("v4-8"))
    assert len(topologies.devices(topologies.lookup("gpu"))) == 1


def test_every_slice_has_its_number_of_devices_and_hosts():
    pytest.importorskip("libtpu")
    for name in EVERY:
        found = topologies.lookup(name)
        devices = topologies.devices(found)
        assert len(devices) == found.num_chips
        assert len({d.process_index for d in devices}) == found.num_hosts


@pytest.mark.parametrize(("kind", "peak"), [("TPU v5 lite", 197e12), ("NVIDIA H200", 989e12)])
def test_the_peak_of_local_devices(kind, peak, monkeypatch):
    assert topologies.device_peak_flops() == 0.0
    device = types.SimpleNamespace(device_kind=kind)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    assert topologies.device_peak_flops() == peak


def test_every_chip_has_its_device_kind():
    pytest.importorskip("libtpu")
    for name in ("v4-8", "v5p-8", "v5e-4", "v6e-4"):
        found = topologies.lookup(name)
        assert topologies.devices(found)[0].device_kind in found.chip.kinds


def test_devices_know_their_slice():
    pytest.importorskip("libtpu")
    devices = topologies.devices(topologies.lookup("v4-16", 3))
    assert len(devices) == 24 and len({d.process_index for d in devices}) == 6
    assert {d.slice_index for d in devices} == {0, 1, 2}


def test_libtpu_is_silent_without_a_tpu():
    pytest.importorskip("libtpu")
    code = (
        "import jax; from imagen_jax.common import cli; cli.run(lambda argv: print(jax.devices()))"
    )
    env = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT
    )
    assert done.returncode == 0 and "id=0" in done.stdout
    if "TPU" not in done.stdout:
        assert "libtpu" not in done.stderr and "TPU_" not in done.stderr
