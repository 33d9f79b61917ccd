"""Counting in HLO against XLA's own count, rooflines, the cache, the report, and bad input."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from conftest import load_config, shrink
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from imagen_jax import plan
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.devices import compilation, sharding, topologies
from imagen_jax.planning import compiling, costs, hlo, report, roofline, search

V4 = topologies.lookup("v4-8")
GIB = 2**30


def convolution(x, w, stride=1):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=names)


def compiled_text(f, *args, **kwargs):
    return jax.jit(f, **kwargs).lower(*args).compile().as_text()


def total_flops(text):
    return sum(o.times * o.flops for o in costs.count(hlo.parse(text)).operations)


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_convolutions_are_those_of_xla(stride):
    def loss(w, v, x):
        return (convolution(x, w, stride).reshape(-1, 16) @ v).sum()

    args = jnp.ones((3, 3, 8, 16)), jnp.ones((16, 4)), jnp.ones((2, 12, 10, 8))
    compiled = jax.jit(jax.grad(loss, (0, 2))).lower(*args).compile()
    ours, xla = total_flops(compiled.as_text()), compiled.cost_analysis()["flops"]
    # XLA counts what is done element by element as well.
    assert 0.97 * xla < ours <= xla


def test_the_body_of_a_loop_counts_as_often_as_it_runs():
    def looped(ws, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(convolution(h, w)), None), x, ws)[0].sum()

    def unrolled(ws, x):
        for w in ws:
            x = jnp.tanh(convolution(x, w))
        return x.sum()

    args = jnp.ones((5, 3, 3, 8, 8)), jnp.ones((2, 8, 8, 8))
    text = compiled_text(jax.grad(looped, (0, 1)), *args)
    assert "while(" in text
    # Without the note that XLA for CPUs leaves and XLA for TPUs does not.
    stripped = text.replace("known_trip_count", "stripped")
    expected = total_flops(compiled_text(jax.grad(unrolled, (0, 1)), *args))
    assert total_flops(text) == total_flops(stripped) == expected
    assert costs.count(hlo.parse(stripped)).unknown_loops == 0


LOOP = """HloModule m, num_partitions=8

%body (p: (s32[], s32[], f32[1024])) -> (s32[], s32[], f32[1024]) {
  %p = (s32[], s32[], f32[1024]{0:T(1024)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  %x = f32[1024]{0:T(1024)} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %sum = f32[1024]{0:T(1024)} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  ROOT %out = (s32[], s32[], f32[1024]) tuple(%next, %n, %sum)
}

%condition (p.1: (s32[], s32[], f32[1024])) -> pred[] {
  %p.1 = (s32[], s32[], f32[1024]) parameter(0)
  %i.1 = s32[] get-tuple-element(%p.1), index=0
  %n.1 = s32[] get-tuple-element(%p.1), index=1
  ROOT %lt = pred[] compare(%i.1, %n.1), direction=LT
}

ENTRY %main (a: f32[1024]) -> f32[1024] {
  %a = f32[1024]{0:T(1024)} parameter(0)
  %zero = s32[] constant(0)
  %end = s32[] END
  %init = (s32[], s32[], f32[1024]) tuple(%zero, %end, %a)
  %loop = (s32[], s32[], f32[1024]) while(%init), condition=%condition, body=%body
  ROOT %r = f32[1024] get-tuple-element(%loop), index=2, backend_config={"estimated_cycles":"7"}
}
"""


def test_turns_of_a_loop_whose_limit_is_part_of_its_state():
    found = costs.count(hlo.parse(LOOP.replace("END", "constant(6)")))
    assert found.collectives == {"all-reduce": {"count": 6, "bytes": 6 * 2 * 3 / 4 * 4096}}
    assert found.unknown_loops == 0


def test_a_loop_without_a_known_end_is_said_to_be_one_turn():
    found = costs.count(hlo.parse(LOOP.replace("END", "copy(%a)")))
    assert found.collectives["all-reduce"]["count"] == 1
    assert found.unknown_loops == 1


SCATTER = """HloModule m, num_partitions=4

%all-reduce-scatter (x: f32[1024]) -> f32[256] {
  %x = f32[1024] parameter(0)
  %sum = f32[1024] all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %own = f32[256] dynamic-slice(%sum, %zero), dynamic_slice_sizes={256}
}

ENTRY %main (a: f32[1024]) -> f32[256] {
  %a = f32[1024] parameter(0)
  ROOT %fusion = f32[256] fusion(%a), kind=kCustom, calls=%all-reduce-scatter
}
"""


def test_an_all_reduce_fused_with_its_slice_is_a_reduce_scatter():
    found = costs.count(hlo.parse(SCATTER))
    assert found.collectives == {"reduce-scatter": {"count": 1, "bytes": 3 / 4 * 4096}}
    assert [o.waits_for for o in found.operations] == [3 / 4 * 4096]


GATHERS = """HloModule m, num_partitions=4

ENTRY %main (a: f32[256]) -> f32[1024] {
  %a = f32[256] parameter(0)
  %start = (f32[256], f32[1024]) all-gather-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = f32[1024] all-gather-done(%start)
  %side = f32[2048] custom-call(%done, %done), custom_call_target="ConcatBitcast"
  ROOT %now = f32[1024] all-gather(%a), replica_groups={{0,1,2,3}}, dimensions={0}
}
"""


def test_only_a_collective_that_is_not_started_ahead_is_waited_for():
    found = costs.count(hlo.parse(GATHERS))
    assert found.collectives["all-gather"] == {"count": 2, "bytes": 2 * 3 * 1024}
    # And naming two arrays that lie side by side as one moves nothing.
    moved_now = 1024 + 4096
    assert [(o.waits_for, o.bytes) for o in found.operations] == [(3 * 1024, moved_now)]


OUTSIDE = """HloModule m, num_partitions=4

ENTRY %main (a: bf16[1024]) -> bf16[1024] {
  %a = bf16[1024] parameter(0)
  %key = token[] after-all()
  %send = (bf16[1024], u32[], token[]) send(%a, %key), is_host_transfer=true, \
    frontend_attributes={_xla_megascale_target="{1,2,3,4}x{0:3}"}
  %sent = token[] send-done(%send)
  %recv = (bf16[1024]{0:T(8,128)}, u32[], token[]) recv(%key), is_host_transfer=true, \
    frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
    _xla_megascale_target="{1,2,3,4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %received = (bf16[1024], token[]) recv-done(%recv)
  %out = bf16[1024] get-tuple-element(%received), index=0
  %away = (bf16[1024]{0:S(5)}, bf16[1024]{0}, u32[]{:S(2)}) copy-start(%out)
  %there = bf16[1024]{0:S(5)} copy-done(%away)
  %home = (bf16[1024]{0}, bf16[1024]{0:S(5)}, u32[]{:S(2)}) copy-start(%there)
  %here = bf16[1024] copy-done(%home)
  %near = (bf16[1024]{0:S(1)}, bf16[1024]{0}, u32[]{:S(2)}) copy-start(%here)
  ROOT %done = bf16[1024] copy-done(%near)
}
""".replace("\\\n    ", "")


def test_what_goes_to_other_slices_and_to_the_host():
    found = costs.count(hlo.parse(OUTSIDE))
    assert found.collectives == {"between-slices": {"count": 1, "bytes": 2 * 3 / 4 * 2048}}
    assert found.host_bytes == 2 * 2048


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", 2),
        ("replica_groups=[2,4]<=[8], x=1", 4),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x=1", 4),
        ("replica_groups={}, x=1", 8),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4] {'b','c'}, x={1}", 8),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([2,2]T(1,0)) {'b'}, x={1}", 4),
        ("replica_groups=mesh['a'=8] {'a':(2)2}, x={1}", 2),
    ],
)
def test_the_size_of_a_group(groups, size):
    i = hlo.Instruction("c", "f32[8]", "all-gather", ("x",), f"%x), {groups}")
    assert costs.group_size(i, 8) == size


def test_collectives_of_a_sharded_program():
    mesh = sharding.make_mesh(sharding.MeshConfig(data=2, fsdp=4), jax.devices())
    rows, whole = NamedSharding(mesh, P("fsdp")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=rows)
    text = compiled_text(lambda x: (x * 2, x.sum()), x, out_shardings=(whole, whole))
    found = costs.count(hlo.parse(text)).collectives
    assert found["all-gather"] == {"count": 1, "bytes": 3 / 4 * 32 * 16 * 4}
    assert found["all-reduce"] == {"count": 1, "bytes": 2 * 3 / 4 * 4}


def test_a_slice_of_an_array_moves_the_slice():
    def f(x, i):
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False) * 2

    x = jax.ShapeDtypeStruct((1000, 64), jnp.float32)
    text = compiled_text(f, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert sum(o.bytes for o in costs.count(hlo.parse(text)).operations) < 4 * 64 * 16


def operations(**kwargs):
    return costs.Costs([costs.Operation(3, **kwargs), costs.Operation(1, flops=1e12)], {})


def test_the_roofline_is_the_largest_bound():
    counted = operations(flops=2e12, bytes=1.2e9)
    received = {"all-gather": {"count": 1, "bytes": 2e9}}
    counted = dataclasses.replace(counted, collectives=received)
    step = roofline.estimate(counted, {"flops": 3e12, "bytes accessed": 1.2e9}, V4, fast=True)
    # XLA saw 3 TFLOP, of which the loop's 2 come three times.
    assert step.flops == pytest.approx(7e12)
    bounds = {"compute": 7e12 / 275e12, "memory": 3.6e9 / 1.2e12, "interconnect": 2e9 / 100e9}
    assert step.bounds == pytest.approx(bounds)
    assert (step.binds, step.step_s) == ("compute", pytest.approx(7 / 275))
    assert step.compiler_s is None


def test_a_chip_waits_for_exposed_collectives_after_its_own_work():
    alone = costs.Operation(2, bytes=1e9, cycles=7, waits_for=1e9)
    counted = operations(flops=2e12, cycles=int(0.02 * V4.chip.clock_hz))
    counted = dataclasses.replace(counted, operations=[*counted.operations, alone])
    xla = {"flops": 3e12, "bytes accessed": 1.0, "optimal_seconds": 0.0}
    step = roofline.estimate(counted, xla, V4, fast=False)
    assert step.exposed_s == pytest.approx(2 * 1e9 / 100e9)
    assert step.compiler_s == pytest.approx(3 * 0.02 + 1e12 / 275e12)
    assert step.step_s == pytest.approx(step.compiler_s + step.exposed_s)
    # At the least effort weights are gathered at once, and training's program does not.
    gathered = dataclasses.replace(counted, collectives={"all-gather": {"count": 1, "bytes": 5e8}})
    step = roofline.estimate(gathered, xla, V4, fast=True)
    assert step.exposed_s == pytest.approx((2e9 - 5e8) / 100e9)


def test_no_step_is_faster_than_what_leaves_the_chip():
    received = {"all-reduce": {"count": 1, "bytes": 1e9}, "between-slices": {"bytes": 1e9}}
    counted = dataclasses.replace(operations(flops=0.0), collectives=received)
    step = roofline.estimate(counted, {"flops": 1e12, "bytes accessed": 0.0}, V4, fast=True)
    assert step.bounds["network"] == step.step_s == pytest.approx(1 / 6.25)
    assert step.binds == "network" and "host" not in step.bounds
    assert step.bounds["interconnect"] == pytest.approx(1 / 100)
    counted = dataclasses.replace(counted, host_bytes=30e9)
    step = roofline.estimate(counted, {"flops": 1e12, "bytes accessed": 0.0}, V4, fast=True)
    assert step.bounds["host"] == step.step_s == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("fast", "optimal", "expected"),
    [
        (False, 0.05, (0.06, "cycles")),
        (True, 0.05, (0.05 * 7 / 3, "optimal_seconds")),
        (True, -0.99, (None, "")),
    ],
)
def test_the_compilers_estimate_if_it_is_sane(fast, optimal, expected):
    cycles = int(V4.chip.clock_hz * (0.06 - 1e12 / 275e12) / 3)
    counted = operations(flops=2e12, cycles=cycles)
    xla = {"flops": 3e12, "bytes accessed": 1.0, "optimal_seconds": optimal}
    step = roofline.estimate(counted, xla, V4, fast)
    assert (step.compiler_s, step.source) == (
        expected[0] and pytest.approx(expected[0]),
        expected[1],
    )
    assert step.step_s == (step.compiler_s or step.roofline_s)


@pytest.mark.parametrize(
    ("message", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (245.88G) exceeds available HBM (30.75G).",
            245.88 * GIB,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory "
            "space hbm. Used 33.62G of 30.75G hbm. Exceeded hbm capacity by 2.87G.",
            33.62 * GIB,
        ),
        ("RESOURCE_EXHAUSTED: no threads left", None),
        ("INTERNAL: Used 1G of 2G hbm", None),
    ],
)
def test_how_much_too_large_a_program_is(message, needed):
    assert compiling.too_large(message) == (needed and pytest.approx(needed))


class FakeLowered:
    """Stands in for a lowered program; counts how often it is compiled."""

    def __init__(self, text="HloModule a", error=""):
        self.text, self.error, self.compiled = text, error, 0

    def as_text(self):
        return self.text

    def compile(self, compiler_options):
        self.compiled += 1
        if self.error:
            raise jax.errors.JaxRuntimeError(self.error)
        sizes = ("argument", "output", "alias", "temp", "generated_code")
        stats = types.SimpleNamespace(**{f"{s}_size_in_bytes": 10 + n for n, s in enumerate(sizes)})
        return types.SimpleNamespace(
            memory_analysis=lambda: stats,
            cost_analysis=lambda: {"flops": 3.0, "bytes accessed": 4.0},
            as_text=lambda: LOOP,
        )


def test_a_program_is_compiled_once(tmp_path):
    lowered = FakeLowered()
    first = compiling.compile_step(lowered, "v4-8", {}, tmp_path / "cache")
    again = compiling.compile_step(lowered, "v4-8", {}, tmp_path / "cache")
    assert lowered.compiled == 1
    assert (first.cached, again.cached) == (False, True)
    assert again == dataclasses.replace(first, cached=True)
    assert first.needed == 10 + 11 - 12 + 13 + 14
    for target, options, text in (("v4-16", {}, "a"), ("v4-8", {"x": 1}, "a"), ("v4-8", {}, "b")):
        other = FakeLowered(text)
        assert not compiling.compile_step(other, target, options, tmp_path / "cache").cached


def test_a_program_too_large_is_remembered_too(tmp_path):
    lowered = FakeLowered(error="RESOURCE_EXHAUSTED: Used 33.5G of 30.75G hbm.")
    for cached in (False, True):
        found = compiling.compile_step(lowered, "v4-8", {}, tmp_path)
        assert (found.cached, found.needed, found.text) == (cached, 33.5 * GIB, "")
    assert lowered.compiled == 1


def test_another_error_of_the_compiler_is_not_hidden(tmp_path):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        compiling.compile_step(FakeLowered(error="INTERNAL: no"), "v4-8", {}, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_search_goes_from_the_mesh_to_what_it_keeps():
    tried = []

    def attempt(s):
        tried.append(dataclasses.astuple(s))
        # Twice the microbatches, or block, make it fit; tensor is fast and block slow.
        fits = s.remat == "block" or s.microbatches >= 2
        seconds = 1 / s.fsdp / s.tensor + (s.remat == "block")
        return {"step_s": seconds if fits else None}

    start = search.Setting("none", 4, 1, 1)
    rows = search.search(start, ("none", "block"), 16, attempt)
    assert tried == [
        ("none", 4, 1, 1),
        ("none", 8, 1, 1),
        ("none", 8, 1, 2),
        ("none", 16, 1, 1),
        ("none", 16, 1, 2),
        ("none", 8, 2, 1),
        ("none", 8, 2, 2),
        ("block", 16, 1, 1),
    ]
    assert [row["step_s"] for row in rows][-3:] == [None, 1 / 16, 1 + 1 / 16]


def test_the_search_takes_fewer_microbatches_while_they_are_faster():
    tried = []

    def attempt(s):
        tried.append((s.remat, s.microbatches))
        return {"step_s": None if s.microbatches == 1 else s.microbatches + (s.remat == "block")}

    search.search(search.Setting("block", 1, 1, 8), ("none", "block"), 1, attempt)
    assert tried == [("block", 8), ("none", 8), ("none", 4), ("none", 2), ("none", 1)]


def test_a_search_in_which_nothing_fits_ends():
    tried = []

    def attempt(s):
        tried.append(s.microbatches)
        return {"step_s": None}

    search.search(search.Setting("block", 1, 1, 8), ("block",), 1, attempt)
    assert tried == [8, 16, 32]


def test_the_sizes_of_a_search_divide_the_slice():
    assert search.meshes(1) == [(1, 1)]
    assert search.meshes(4) == [(4, 1), (2, 2)]
    assert search.meshes(16) == [(8, 1), (16, 1), (8, 2)]
    assert search.meshes(256) == [(8, 1), (64, 1), (8, 2), (64, 2)]


def test_the_nearest_setting_comes_first():
    none = search.Setting("none", 1, 1, 1)
    tried = search.nearest(none, 8, split=True)
    assert tried[:2] == [search.Setting("block", 1, 1, 1), search.Setting("none", 8, 1, 1)]
    assert tried[-1] == search.Setting("block", 8, 1, 8)
    assert {s.fsdp for s in search.nearest(none, 8, split=False)} == {1}
    block = search.Setting("block", 8, 1, 1)
    assert search.nearest(block, 8, split=True)[0] == search.Setting("block", 8, 1, 2)


@pytest.fixture
def on_cpu(monkeypatch):
    """CPUs play the chips of v4-8, and XLA for CPUs the compiler."""
    monkeypatch.setattr(topologies, "devices", lambda topology: jax.devices()[: topology.num_chips])
    monkeypatch.setattr(compiling, "effort", lambda fast: {})


def small(**changes):
    """The demo's config with a network of a single level: compiling is all that takes time here."""
    config = shrink(load_config("demo"))
    config.model.channel_mult, config.model.attention_resolutions = (1,), (8,)
    return dataclasses.replace(parse(config), **changes)


def test_a_plan_has_every_figure(on_cpu, tmp_path):
    config = small()
    found = plan.Planner(config, V4, True, tmp_path / "cache").plan(config)
    memory, flops = found["memory"], found["flops"]
    assert memory["fits"] and memory["needed"] > memory["state"]["weights"] * 2
    assert memory["state"]["weights"] == 4 * found["parameters"]
    # The backward pass spares the gradients of what is not trained; nothing is recomputed.
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
    plan.write(found, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == json.loads(json.dumps(found))
    page = (tmp_path / "plan.html").read_text()
    assert "It fits" in page and "MFU" in page and "http" not in page
    assert f"{found['parameters']:,}" in report.text(found)


@pytest.fixture
def fake_compiler(monkeypatch, on_cpu):
    """Halves what a program needs with every microbatch and with remat; its text is LOOP."""
    monkeypatch.setitem(compilation.OPTIONS, "cpu", {"as_training": True})

    def compile_step(lowered, target, options, cache):
        assert options == {"as_training": True}
        text = lowered.as_text()
        needed = 100 * GIB / text["microbatches"] / (2 if text["remat"] == "block" else 1)
        cost = {"flops": 1e12, "bytes accessed": 1e9}
        kept = LOOP.replace("END", "constant(2)") if needed <= V4.chip.hbm_bytes else ""
        return compiling.Compiled({"arguments": 1} if kept else {}, cost, kept, needed, 1.0)

    monkeypatch.setattr(compiling, "compile_step", compile_step)

    def lower(built):
        setting = {"microbatches": built.config.microbatches, "remat": built.config.mesh.remat}
        return types.SimpleNamespace(as_text=lambda: setting)

    monkeypatch.setattr(plan, "lower", lower)


def test_what_does_not_fit_is_told_what_would(fake_compiler, tmp_path):
    config = small(mesh=sharding.MeshConfig(remat="none"))
    planner = plan.Planner(config, V4, True, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": ""}
    found["suggestion"] = planner.suggest(found["memory"])
    assert not found["memory"]["fits"] and "pace" not in found
    said = report.verdict(found)
    assert "69.25 GiB more than the 30.75 GiB" in said and "\n" not in said
    assert "--config.mesh.remat=block" in said and "--config.microbatches=2" in said
    assert "does not fit" in report.page(found)


def test_the_search_ranks_what_fits(fake_compiler, tmp_path):
    config = small(batch_size=32)
    planner = plan.Planner(config, V4, True, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": "", "search": planner.search()}
    rows = report.search_rows(found)[1:]
    fits = [row for row in rows if row[5]]
    assert fits == rows[: len(fits)] and {row[-1] for row in rows[len(fits) :]} == {"does not fit"}
    assert {row[0] for row in fits} == set(sharding.REMAT)
    assert rows[0][0] in report.text(found) and "Search" in report.page(found)


def test_a_plan_of_two_slices(fake_compiler, tmp_path):
    config = small(batch_size=32, mesh=sharding.MeshConfig(slice=2, fsdp=0, remat="block"))
    config = dataclasses.replace(config, microbatches=2)
    planner = plan.Planner(config, topologies.lookup("v4-8", 2), True, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": ""}
    assert found["mesh"] == {"slice": 2, "data": 1, "fsdp": 4, "tensor": 1}
    assert found["pace"]["chip_hours"] == pytest.approx(found["pace"]["days"] * 24 * 8)
    assert "2 x v4-8: 8 chips (2 slices of 2x2x1), 2 host(s)" in report.text(found)
    rows = planner.search()
    assert {(row["fsdp"], row["tensor"]) for row in rows} == {(4, 1), (2, 2)}
    assert {row["remat"] for row in rows} == set(sharding.REMAT)


def test_a_batch_that_does_not_divide(on_cpu, tmp_path):
    config = small(batch_size=6)
    with pytest.raises(UserError, match=r"batch_size is 6.*multiple of 4"):
        plan.Planner(config, V4, True, tmp_path).plan(config)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_what_cannot_be_compiled_for_has_the_analytic_part(name, tmp_path):
    config = small()
    planner = plan.Planner(config, topologies.lookup(name), False, tmp_path)
    found = planner.plan(config) | {"config": "c", "command": ""}
    assert found["memory"]["fits"] and found["compiler"] is None and "step" not in found
    assert ("pace" in found) == (name == "gpu")
    assert "activations come on top" in report.text(found)


def test_the_input_of_this_host(tiny_data, monkeypatch):
    values = shrink(load_config("demo")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    monkeypatch.setattr(plan, "INPUT_SECONDS", 0.1)
    assert "images/s" in plan.measured_input(parse(values))
    values["data"]["dir"] = "nowhere"
    assert "no config.data.dir=nowhere" in plan.measured_input(parse(values))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "--config=FILE and --out=DIR"),
        (["--config=configs/demo.py"], "--out=DIR"),
        (["--config=configs/demo.py", "--out={out}"], "--topology is missing"),
        (["--config=configs/demo.py", "--out={out}", "--topology=v4-7"], "'v4-7'; allowed: v4-8"),
        (
            ["--config=configs/demo.py", "--out={out}", "--topology=gpu", "--search"],
            "--search compiles, and for gpu",
        ),
    ],
)
def test_bad_input_is_one_line(args, message, tmp_path, flag_values):
    with pytest.raises(UserError, match=message):
        flag_values([a.format(out=tmp_path) for a in args])


@pytest.fixture
def flag_values():
    """Runs main with flags, and takes them back."""
    before = set(flags.FLAGS)
    plan.define_flags()

    def run(args):
        flags.FLAGS(["plan", *args])
        plan.main([])

    yield run
    for name in set(flags.FLAGS) - before:
        delattr(flags.FLAGS, name)


def test_the_step_compiles_for_two_slices_of_a_tpu(tmp_path):
    pytest.importorskip("libtpu")
    config = small(mesh=sharding.MeshConfig(slice=2, remat="offload"))
    found = plan.Planner(config, topologies.lookup("v4-8", 2), True, tmp_path).plan(config)
    step = found["step"]
    assert found["memory"]["fits"] and step["step_s"] > 0 and step["unknown_loops"] == 0
    # Each chip of a slice has its part of the gradients added up with those of the other slice.
    gradients = found["parameters"] / 4 * 4
    assert 0.5 * gradients < step["collectives"]["between-slices"]["bytes"] < 1.5 * gradients
    assert step["host_bytes"] > 0 and {"network", "host"} <= set(step["bounds"])
