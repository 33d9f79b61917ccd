"""Shared by the tests of planning: a topology, a small config, HLO programs to count."""

import dataclasses

import jax
from conftest import load_config, shrink

from imagen_jax.config import parse
from imagen_jax.devices import topologies
from imagen_jax.planning import costs, hlo

V4 = topologies.lookup("v4-8")
GIB = 2**30

# A loop with an all-reduce in its body; replace END to set the loop's limit.
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


def small(**changes):
    """The demo's config with a one-level network, which compiles quickly."""
    config = shrink(load_config("demo", "unet"))
    config.model.channel_mult, config.model.attention_resolutions = (1,), (8,)
    return dataclasses.replace(parse(config), **changes)


def convolution(x, w, stride=1):
    names = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (stride,) * 2, "SAME", dimension_numbers=names)


def compiled_text(f, *args, **kwargs):
    return jax.jit(f, **kwargs).lower(*args).compile().as_text()


def total_flops(text):
    return sum(o.times * o.flops for o in costs.count(hlo.parse(text)).operations)
