"""What the tests of both U-Nets share: states and inputs made from a config alone."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from imagen_jax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from imagen_jax.models.unet import UNet, UNetConfig

NETWORKS = {UNetConfig: UNet, EfficientUNetConfig: EfficientUNet}
BATCH, TOKENS = 2, 5

# The tiny programs compile twice as fast without XLA's expensive passes.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def make(config):
    """rngs -> the network of a config, whichever it is."""
    return lambda rngs: NETWORKS[type(config)](config, rngs=rngs)


def abstract(config):
    """The network's graphdef and its state without memory."""
    return nnx.split(nnx.eval_shape(lambda: make(config)(nnx.Rngs(0))))


def count(config):
    """Its number of parameters."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract(config)[1]))


def random_state(config):
    """A state whose every parameter is random, so that no zero at the start hides a path."""
    leaves, treedef = jax.tree.flatten(abstract(config)[1])
    rng = np.random.default_rng(0)
    filled = [jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    return jax.tree.unflatten(treedef, filled)


def inputs(config, scale=1):
    """z, log_snr and cond of a batch whose images are `scale` times as large as it trains on."""
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
    """The same conditioning with the embedding of one token of the first example changed."""
    return {**cond, "text": cond["text"].at[0, token].add(3.0)}
