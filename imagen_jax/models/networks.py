"""The table of networks, and the boundary between Flax NNX and the rest of the project.

`build` turns a module into two pure functions over nested dicts, init and apply. The optimizer,
EMA, checkpoints and shardings then work on ordinary pytrees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from imagen_jax.models.denoiser import NetworkConfig, add_low_res
from imagen_jax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from imagen_jax.models.transformer import Transformer, TransformerConfig
from imagen_jax.models.unet import UNet, UNetConfig

Params = dict[str, Any]
BlockRunner = Callable[..., Any]


class Network(NamedTuple):
    """An entry of NETWORKS: the typed config section `model`, and the module built from it."""

    config: type[NetworkConfig]
    module: type[nnx.Module]


# The values of the config key model.name.
NETWORKS = {
    "unet": Network(UNetConfig, UNet),
    "efficient_unet": Network(EfficientUNetConfig, EfficientUNet),
    "transformer": Network(TransformerConfig, Transformer),
}


@dataclasses.dataclass(frozen=True)
class Functional:
    """A network as two pure functions.

    Attributes:
      init: key -> params, nested dicts of float32 arrays with string keys.
      apply: (params, *args, run=None, **kwargs) -> the module's output. With `run`, each block of
        the network runs as run(pure_function, block_params, *arrays), which lets
        sharding.block_runner add rematerialization and all-gather the weights of a block.
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Wraps the module that `make(rngs)` builds. Traces its structure once, without allocating."""
    graphdef, template = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: jax.Array) -> Params:
        return _string_keys(nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)))))

    def apply(params: Params, *args: Any, run: BlockRunner | None = None, **kwargs: Any) -> Any:
        state = jax.tree.map(lambda x: x, template)
        nnx.replace_by_pure_dict(state, _int_keys(params))
        if run is not None:
            kwargs["run_block"] = functools.partial(_run_pure, run)
        return nnx.merge(graphdef, state)(*args, **kwargs)

    return Functional(init, apply)


def build(config: NetworkConfig) -> Functional:
    """Builds the network of a config, with the low-resolution image in its output if it says so."""
    module = next(n.module for n in NETWORKS.values() if n.config is type(config))
    network = functional(lambda rngs: module(config, rngs=rngs))

    def apply(params: Params, z: Any, log_snr_b: Any, cond: Any, **kwargs: Any) -> Any:
        return add_low_res(network.apply(params, z, log_snr_b, cond, **kwargs), cond, config)

    return Functional(network.init, apply) if config.low_res_skip else network


def without_scan(config: NetworkConfig) -> NetworkConfig:
    """Unrolls the blocks of a network, because XLA's cost analysis counts a loop body once."""
    if getattr(config, "scan_blocks", False):
        return dataclasses.replace(config, scan_blocks=False)
    return config


def _run_pure(run: BlockRunner, block: nnx.Module, *arrays: Any) -> Any:
    graphdef, state = nnx.split(block)
    return run(lambda params, *xs: nnx.merge(graphdef, params)(*xs), state, *arrays)


def _string_keys(tree: Any) -> Any:
    """Makes all keys strings for checkpoints and overviews; nnx.List numbers children with ints."""
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _int_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _int_keys(v) for k, v in tree.items()}
