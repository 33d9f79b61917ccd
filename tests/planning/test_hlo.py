"""Instructions run as often as the loops around them say."""

import jax
import jax.numpy as jnp
import pytest
from planning_helpers import LOOP, compiled_text, convolution, total_flops

from imagen_jax.planning import costs, hlo


def test_a_loop_body_counts_as_often_as_it_runs():
    def looped(ws, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(convolution(h, w)), None), x, ws)[0].sum()

    def unrolled(ws, x):
        for w in ws:
            x = jnp.tanh(convolution(x, w))
        return x.sum()

    args = jnp.ones((5, 3, 3, 8, 8)), jnp.ones((2, 8, 8, 8))
    text = compiled_text(jax.grad(looped, (0, 1)), *args)
    assert "while(" in text
    # XLA for CPUs writes the trip count into the text; XLA for TPUs does not.
    stripped = text.replace("known_trip_count", "stripped")
    expected = total_flops(compiled_text(jax.grad(unrolled, (0, 1)), *args))
    assert total_flops(text) == total_flops(stripped) == expected
    assert costs.count(hlo.parse(stripped)).unknown_loops == 0


def test_the_trip_count_comes_from_a_limit_in_the_loops_state():
    found = costs.count(hlo.parse(LOOP.replace("END", "constant(6)")))
    assert found.collectives == {"all-reduce": {"count": 6, "bytes": 6 * 2 * 3 / 4 * 4096}}
    assert found.unknown_loops == 0


def test_a_loop_with_an_unknown_limit_counts_as_one_iteration():
    found = costs.count(hlo.parse(LOOP.replace("END", "copy(%a)")))
    assert found.collectives["all-reduce"]["count"] == 1
    assert found.unknown_loops == 1


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ("f32[2,3]{1,0:T(8,128)}", [(4.0, (2, 3))]),
        ("(s32[], pred[5])", [(4.0, ()), (1.0, (5,))]),
        ("(bf16[1024]{0:S(5)}, token[])", [(2.0, (1024,)), (0.0, ())]),
    ],
)
def test_a_shape_lists_its_arrays(shape, expected):
    assert hlo.arrays(shape) == expected
