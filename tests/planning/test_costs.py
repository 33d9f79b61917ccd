"""FLOPs match XLA's own count; collectives and memory traffic match counts by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from planning_helpers import compiled_text, convolution, total_flops

from imagen_jax.devices import sharding
from imagen_jax.planning import costs, hlo


@pytest.mark.parametrize("stride", [1, 2])
def test_flops_of_convolutions_match_xla(stride):
    def loss(w, v, x):
        return (convolution(x, w, stride).reshape(-1, 16) @ v).sum()

    args = jnp.ones((3, 3, 8, 16)), jnp.ones((16, 4)), jnp.ones((2, 12, 10, 8))
    compiled = jax.jit(jax.grad(loss, (0, 2))).lower(*args).compile()
    ours, xla = total_flops(compiled.as_text()), compiled.cost_analysis()["flops"]
    # XLA also counts elementwise operations.
    assert 0.97 * xla < ours <= xla


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


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
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


def test_a_chip_waits_only_for_synchronous_collectives():
    found = costs.count(hlo.parse(GATHERS))
    assert found.collectives["all-gather"] == {"count": 2, "bytes": 2 * 3 * 1024}
    # ConcatBitcast, which names two adjacent arrays as one, moves nothing.
    synchronous = 1024 + 4096
    assert [(o.waits_for, o.bytes) for o in found.operations] == [(3 * 1024, synchronous)]


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


def test_bytes_to_other_slices_and_to_the_host():
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
def test_group_size_reads_every_notation(groups, size):
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


def test_a_slice_of_an_array_counts_as_the_slice():
    def f(x, i):
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False) * 2

    x = jax.ShapeDtypeStruct((1000, 64), jnp.float32)
    text = compiled_text(f, x, jax.ShapeDtypeStruct((), jnp.int32))
    assert sum(o.bytes for o in costs.count(hlo.parse(text)).operations) < 4 * 64 * 16
