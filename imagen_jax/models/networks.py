"""The table of networks, and the border between Flax NNX and the rest of the project.

`build` turns a module into two pure functions, init and apply, over plain nested dicts. Optimizer,
EMA, checkpoints and shardings then work on ordinary pytrees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from imagen_jax.models.denoiser import NetworkConfig
from imagen_jax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from imagen_jax.models.unet import UNet, UNetConfig

Params = dict[str, Any]
BlockRunner = Callable[..., Any]


class Network(NamedTuple):
    """An entry of NETWORKS: the config section `model`, and the module that it describes."""

    config: type[NetworkConfig]
    module: type[nnx.Module]


# By config key model.name.
NETWORKS = {
    "unet": Network(UNetConfig, UNet),
    "efficient_unet": Network(EfficientUNetConfig, EfficientUNet),
}


@dataclasses.dataclass(frozen=True)
class Functional:
    """A network as two pure functions.

    Attributes:
      init: key -> params, nested dicts of float32 arrays with string keys.
      apply: (params, *args, run=None, **kwargs) -> the module's output. If `run` is given, every
        block is called as run(pure_function, its_params, *arrays), which lets the caller
        rematerialize blocks and all-gather their weights (see sharding.block_runner).
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Wraps the module that `make(rngs)` builds, tracing its structure once without allocating."""
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
    """The network that a config describes."""
    module = next(n.module for n in NETWORKS.values() if n.config is type(config))
    return functional(lambda rngs: module(config, rngs=rngs))


def without_scan(config: NetworkConfig) -> NetworkConfig:
    """The same network, its blocks unrolled, because XLA's cost analysis counts a loop once."""
    if getattr(config, "scan_blocks", False):
        return dataclasses.replace(config, scan_blocks=False)
    return config


def _run_pure(run: BlockRunner, block: nnx.Module, *arrays: Any) -> Any:
    graphdef, state = nnx.split(block)
    return run(lambda params, *xs: nnx.merge(graphdef, params)(*xs), state, *arrays)


def _string_keys(tree: Any) -> Any:
    """Converts the int keys of nnx.List to strings, as checkpoints and overviews require."""
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _int_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _int_keys(v) for k, v in tree.items()}
