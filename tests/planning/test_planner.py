"""Whole plans: every figure, suggestions, the search, several slices, no compiler."""

import dataclasses
import types

import jax
import pytest
from planning_helpers import GIB, LOOP, V4, small

from imagen_jax.common.errors import UserError
from imagen_jax.devices import compilation, sharding, topologies
from imagen_jax.planning import compiling, report
from imagen_jax.planning import planner as planner_module
from imagen_jax.planning.planner import Planner


@pytest.fixture
def on_cpu(monkeypatch):
    """Replaces the chips of v4-8 with CPUs and libtpu with XLA for CPUs."""
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[: topology.num_chips])
    monkeypatch.setattr(compiling, "effort", lambda fast: {})


def test_the_figures_of_a_plan_are_consistent(on_cpu, tmp_path):
    config = small()
    found = Planner(config, V4, True, tmp_path / "cache").plan(config)
    memory, flops = found["memory"], found["flops"]
    assert memory["fits"] and memory["needed"] > memory["state"]["weights"] * 2
    assert memory["state"]["weights"] == 4 * found["parameters"]
    # Nothing is recomputed, and the backward pass skips gradients of the inputs.
    assert 0.5 < flops["ratio"] < 1.5
    pace, step = found["pace"], found["step"]
    assert pace["images_per_s"] == pytest.approx(config.batch_size / step["step_s"])
    assert pace["hfu"] == pytest.approx(pace["mfu"] * flops["ratio"])
    assert pace["chip_hours"] == pytest.approx(pace["days"] * 24 * 4)
    assert step["collectives"]["all-reduce"]["bytes"] > 4 * found["parameters"]
    assert found["input"]["padded_bytes_per_s_per_host"] == pytest.approx(
        pace["images_per_s"] * (32 * 32 * 3 + 6 * (8 * 2 + 1))
    )
    found |= {"config": "configs/demo.py", "command": "python -m imagen_jax.plan"}
    page = report.page(found)
    assert "It fits" in page and "MFU" in page and "http" not in page
    assert f"{found['parameters']:,}" in report.text(found)


@pytest.fixture
def fake_compiler(monkeypatch, on_cpu):
    """A compiler whose programs need memory inversely to microbatches; block halves it too."""
    monkeypatch.setitem(compilation.OPTIONS, "cpu", {"as_training": True})

    def compile_step(lowered, target, options, cache):
        assert options == {"as_training": True}
        text = lowered.as_text()
        needed = 100 * GIB / text["microbatches"] / (2 if text["remat"] == "block" else 1)
        cost = {"flops": 1e12, "bytes accessed": 1e9}
        kept = LOOP.replace("END", "constant(2)") if needed <= V4.chip.hbm_bytes else ""
        return compiling.Compiled({"arguments": 1} if kept else {}, cost, kept, needed, 1.0)

    monkeypatch.setattr(compiling, "compile_step", compile_step)

    def lower(experiment):
        config = experiment.config
        setting = {"microbatches": config.microbatches, "remat": config.mesh.remat}
        return types.SimpleNamespace(as_text=lambda: setting)

    monkeypatch.setattr(planner_module, "lower", lower)


def test_a_plan_that_does_not_fit_suggests_one_that_does(fake_compiler, tmp_path):
    config = small(mesh=sharding.MeshConfig(remat="none"))
    planner = Planner(config, V4, True, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": ""}
    found["suggestion"] = planner.suggest(found["memory"])
    assert not found["memory"]["fits"] and "pace" not in found
    verdict = report.verdict(found)
    assert "69.25 GiB more than the 30.75 GiB" in verdict and "\n" not in verdict
    assert "--config.mesh.remat=block" in verdict and "--config.microbatches=2" in verdict
    assert "does not fit" in report.page(found)


def test_the_search_ranks_settings_that_fit_first(fake_compiler, tmp_path):
    config = small(batch_size=32)
    planner = Planner(config, V4, True, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": "", "search": planner.search()}
    rows = report.search_rows(found)[1:]
    fits = [row for row in rows if row[5]]
    assert fits == rows[: len(fits)] and {row[-1] for row in rows[len(fits) :]} == {"does not fit"}
    assert {row[0] for row in fits} == set(sharding.REMAT)
    assert rows[0][0] in report.text(found) and "Search" in report.page(found)


def test_a_plan_of_two_slices_counts_the_chips_of_both(fake_compiler, tmp_path):
    config = small(batch_size=32, mesh=sharding.MeshConfig(slice=2, fsdp=0, remat="block"))
    config = dataclasses.replace(config, microbatches=2)
    planner = Planner(config, topologies.lookup("v4-8", 2), True, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": ""}
    assert found["mesh"] == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}
    assert found["pace"]["chip_hours"] == pytest.approx(found["pace"]["days"] * 24 * 8)
    assert "2 x v4-8: 8 chips (2 slices of 2x2x1), 2 host(s)" in report.text(found)
    rows = planner.search()
    assert {(row["fsdp"], row["tensor"]) for row in rows} == {(4, 1), (2, 2)}
    assert {row["remat"] for row in rows} == set(sharding.REMAT)


def test_a_batch_that_the_chips_do_not_divide_is_refused(on_cpu, tmp_path):
    config = small(batch_size=6)
    with pytest.raises(UserError, match=r"batch_size is 6.*multiple of 4"):
        Planner(config, V4, True, tmp_path).plan(config)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_a_plan_without_a_compiler_is_analytic(name, tmp_path):
    config = small()
    planner = Planner(config, topologies.lookup(name), False, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": ""}
    assert found["memory"]["fits"] and found["compiler"] is None and "step" not in found
    assert ("pace" in found) == (name == "gpu")
    assert "activations come on top" in report.text(found)


def test_the_step_compiles_for_two_slices_of_a_tpu(tmp_path):
    pytest.importorskip("libtpu")
    config = small(mesh=sharding.MeshConfig(slice=2, remat="offload"))
    found = Planner(config, topologies.lookup("v4-8", 2), True, tmp_path).plan(config)
    step = found["step"]
    assert found["memory"]["fits"] and step["step_s"] > 0 and step["unknown_loops"] == 0
    # Each chip exchanges its shard of the gradients with the other slice; small arrays are padded.
    gradients = found["parameters"] / 4 * 4
    assert 0.5 * gradients < step["collectives"]["between-slices"]["bytes"] < 2 * gradients
    assert step["host_bytes"] > 0 and {"network", "host"} <= set(step["bounds"])
