"""Attention and its own gradient against JAX's."""

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
def test_it_is_jaxs_and_so_are_its_gradients(mask, spread):
    given = arrays(spread=spread)
    found = with_gradients(attention, mask, *given)
    for one, expected in zip(found, with_gradients(jaxs, mask, *given), strict=True):
        assert one.shape == expected.shape and np.abs(expected).max() > 0.01
        np.testing.assert_allclose(one, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_without_keys_there_is_nothing():
    mask = MASK.at[3].set(False)
    found = with_gradients(attention, mask, *arrays())
    for one, expected in zip(found, with_gradients(attention, MASK, *arrays()), strict=True):
        np.testing.assert_array_equal(one[3], 0.0)
        np.testing.assert_array_equal(one[:3], expected[:3])


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_in_bfloat16_gradients_lose_no_more_than_rounding(offset):
    """Also where what is subtracted is large: gradients and values far from zero."""
    keys = jax.random.split(jax.random.key(1), 4)
    lengths = (256, 640, 640, 256)
    given = [jax.random.normal(k, (1, n, 2, 64)) for k, n in zip(keys, lengths, strict=True)]
    q, k, v, g = (
        x.astype(jnp.bfloat16) for x in (*given[:2], given[2] + offset, given[3] + offset)
    )
    exact = with_gradients(jaxs, None, *(x.astype(jnp.float32) for x in (q, k, v, g)))
    for one, expected in zip(with_gradients(attention, None, q, k, v, g), exact, strict=True):
        assert one.dtype == jnp.bfloat16
        error = jnp.abs(one.astype(jnp.float32) - expected).mean() / jnp.abs(expected).mean()
        assert 0 < error < (0.004 if offset == 0 else 0.012)


@pytest.mark.parametrize("remat", REMAT)
def test_gradients_are_the_same_however_much_is_recomputed(remat):
    if remat == "offload":
        pytest.skip("a CPU has no other memory to keep arrays in")
    given = arrays()
    again = jax.checkpoint(attention, policy=REMAT[remat])
    for one, expected in zip(
        with_gradients(again, MASK, *given), with_gradients(attention, MASK, *given), strict=True
    ):
        np.testing.assert_allclose(one, expected, rtol=1e-6, atol=1e-6)


def test_logits_are_computed_twice_in_training_alone():
    def flops(function):
        return jax.jit(function).lower(*arrays(), MASK).cost_analysis()["flops"]

    def trained(q, k, v, g, mask):
        return jax.vjp(lambda q: attention(q, k, v, mask), q)[0]

    product = 2 * 4 * 6 * 9 * 2 * 8
    alone = flops(lambda q, k, v, g, mask: attention(q, k, v, mask))
    assert 2 * product < alone < 3 * product < flops(trained)


def test_policies_that_keep_attention_compute_its_logits_no_more_often():
    def products(remat):
        again = jax.checkpoint(attention, policy=REMAT[remat])
        jaxpr = jax.make_jaxpr(lambda given: with_gradients(again, MASK, *given))(arrays())
        return str(jaxpr).count("dot_general")

    # Two of logits, the output's, four of gradients; then the exponentials' again, or all three.
    assert (products("save_attention"), products("block")) == (8, 10)


def test_no_logits_are_kept_for_the_backward_pass():
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in arrays())
    _, pull = jax.vjp(attention, q, k, v)
    kept = [x for x in jax.tree.leaves(pull) if x.shape == (4, 2, 6, 9)]
    assert [x.dtype for x in kept] == [jnp.bfloat16]
