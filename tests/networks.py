"""Helpers for the tests of the networks: states and inputs derived from a config."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagen_jax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from imagen_jax.models.transformer import Transformer, TransformerConfig
from imagen_jax.models.unet import UNet, UNetConfig

NETWORKS = {
    UNetConfig: UNet,
    EfficientUNetConfig: EfficientUNet,
    TransformerConfig: Transformer,
}
BATCH, TOKENS = 2, 5

# Tiny programs compile twice as fast without XLA's expensive passes.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(config):
    """Returns the constructor rngs -> network for any kind of config."""
    return lambda rngs: NETWORKS[type(config)](config, rngs=rngs)


def abstract(config):
    """Returns the network's graphdef and its state as shapes, without allocating."""
    return nnx.split(nnx.eval_shape(lambda: make(config)(nnx.Rngs(0))))


def count(config):
    """Counts the network's parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)[1]))


def random_state(config):
    """Returns a state with all parameters random, so that no zero initialization hides a path."""
    leaves, treedef = jax.tree.flatten(abstract(config)[1])
    rng = np.random.default_rng(0)
    filled = [jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    return jax.tree.unflatten(treedef, filled)


def inputs(config, scale=1):
    """Returns z, log_snr and cond for a batch of images `scale` times the training size."""
    rng = np.random.default_rng(1)
    size, small = scale * config.image_size, scale * config.low_res
    z = rng.standard_normal((BATCH, size, size, 3))
    text = rng.standard_normal((BATCH, TOKENS, config.text_dim))
    mask = np.arange(TOKENS)[None, :] < np.array([3, 5])[:, None]
    cond = {"text": jnp.asarray(text, jnp.float32), "text_mask": jnp.asarray(mask)}
    if config.low_res:
        low_res = rng.uniform(-1, 1, (BATCH, small, small, 3))
        cond |= {"low_res": jnp.asarray(low_res, jnp.float32), "aug_level": jnp.array([0.1, 0.7])}
    return jnp.asarray(z, jnp.float32), jnp.array([-2.0, 3.0]), cond


def with_text(cond, token):
    """Returns the conditioning with one token embedding of the first example changed."""
    return {**cond, "text": cond["text"].at[0, token].add(3.0)}


@lru_cache
def compiled(config):
    """Compiles (state, z, log_snr, cond) -> output, gradient of its mean square by the state."""
    graphdef, _ = abstract(config)

    def loss(state, *args):
        out = nnx.merge(graphdef, state)(*args)
        return jnp.square(out).mean(), out

    @jit
    def run(*args):
        (_, out), grads = jax.value_and_grad(loss, has_aux=True)(*args)
        return out, grads

    return run


def assert_trees_close(tree, expected, tolerance):
    """Compares leaf by leaf, relative to the leaf's largest value.

    The scale is at least a thousandth of the tree's largest value: the bias of attention keys that
    are not normalized shifts all logits equally, so its gradient is zero up to rounding.
    """
    most = max(jnp.abs(leaf).max() for leaf in jax.tree.leaves(expected))

    def close(a, b):
        scale = jnp.maximum(jnp.abs(b).max(), 1e-3 * most)
        np.testing.assert_allclose(a, b, atol=tolerance * scale)

    jax.tree.map(close, tree, expected)


def string_keys(tree):
    """Converts keys to strings, as in checkpoints."""
    return {str(k): string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree
