"""Compares attention and its custom gradient with JAX's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.devices.sharding import REMAT
from imagen_jax.models.attention import attention

MASK = jnp.arange(9)[None, :] < jnp.array([9, 4, 1, 6])[:, None]


def arrays(dtype="float32", spread=1.0):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(4, 6, 2, 8), (4, 9, 2, 8), (4, 9, 2, 8), (4, 6, 2, 8)]
    each = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    q, k, v, g = (x.astype(dtype) for x in each)
    return spread * q, k, v, g


def jaxs(q, k, v, mask):
    mask = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask)


def with_gradients(function, mask, q, k, v, g):
    out, pull = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
    return out, *pull(g)


@pytest.mark.parametrize("mask", [None, MASK], ids=["all keys", "masked"])
@pytest.mark.parametrize("spread", [1.0, 100.0])
def test_output_and_gradients_match_jax(mask, spread):
    inputs = arrays(spread=spread)
    found = with_gradients(attention, mask, *inputs)
    for one, expected in zip(found, with_gradients(jaxs, mask, *inputs), strict=True):
        assert one.shape == expected.shape and np.abs(expected).max() > 0.01
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_output_and_gradients_are_zero_without_keys():
    mask = MASK.at[3].set(False)
    found = with_gradients(attention, mask, *arrays())
    for one, expected in zip(found, with_gradients(attention, MASK, *arrays()), strict=True):
        np.testing.assert_array_equal(one[3], 0.0)
        np.testing.assert_array_equal(one[:3], expected[:3])


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_bfloat16_gradients_lose_only_rounding(offset):
    """Includes gradients and values far from zero, where the subtracted term is large."""
    keys = jax.random.split(jax.random.key(1), 4)
    lengths = (256, 640, 640, 256)
    normal = [jax.random.normal(k, (1, n, 2, 64)) for k, n in zip(keys, lengths, strict=True)]
    q, k, v, g = (
        x.astype(jnp.bfloat16) for x in (*normal[:2], normal[2] + offset, normal[3] + offset)
    )
    exact = with_gradients(jaxs, None, *(x.astype(jnp.float32) for x in (q, k, v, g)))
    for one, expected in zip(with_gradients(attention, None, q, k, v, g), exact, strict=True):
        assert one.dtype == jnp.bfloat16
        error = jnp.abs(one.astype(jnp.float32) - expected).mean() / jnp.abs(expected).mean()
        assert 0 < error < (0.004 if offset == 0 else 0.012)


@pytest.mark.parametrize("remat", REMAT)
def test_gradients_do_not_depend_on_the_remat_policy(remat):
    if remat == "offload":
        pytest.skip("a CPU has no second memory to offload to")
    inputs = arrays()
    again = jax.checkpoint(attention, policy=REMAT[remat])
    for one, expected in zip(
        with_gradients(again, MASK, *inputs), with_gradients(attention, MASK, *inputs), strict=True
    ):
        np.testing.assert_allclose(one, expected, rtol=1e-6, atol=1e-6)


def test_logits_are_computed_twice_only_in_training():
    def flops(function):
        return jax.jit(function).lower(*arrays(), MASK).cost_analysis()["flops"]

    def trained(q, k, v, g, mask):
        return jax.vjp(lambda q: attention(q, k, v, mask), q)[0]

    product = 2 * 4 * 6 * 9 * 2 * 8
    alone = flops(lambda q, k, v, g, mask: attention(q, k, v, mask))
    assert 2 * product < alone < 3 * product < flops(trained)


def test_policies_that_save_attention_recompute_no_logits():
    def products(remat):
        again = jax.checkpoint(attention, policy=REMAT[remat])
        jaxpr = jax.make_jaxpr(lambda inputs: with_gradients(again, MASK, *inputs))(arrays())
        return str(jaxpr).count("dot_general")

    # Logits twice, the output, four gradients; then the logits once more, or all three again.
    assert (products("save_attention"), products("block")) == (8, 10)


def test_the_backward_pass_stores_only_the_exponentials():
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    _, pull = jax.vjp(attention, q, k, v)
    stored = [x for x in jax.tree.leaves(pull) if x.shape == (4, 2, 6, 9)]
    assert [x.dtype for x in stored] == [jnp.bfloat16]
