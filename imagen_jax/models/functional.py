"""The border between Flax NNX and the rest: a module becomes init and apply over plain dicts.

Optimizer, EMA, checkpoints and shardings then work on ordinary pytrees.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

Params = dict[str, Any]
BlockRunner = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Functional:
    """A network as two pure functions.

    Attributes:
      init: key -> params, nested dicts of float32 arrays with string keys.
      apply: (params, *args, run=None, **kwargs) -> what calling the module returns. `run`, if
        given, runs every block of the network as run(pure_function, its_params, *arrays): this is
        where rematerialisation and the gathering of weights come in (see sharding.block_runner).
    """

    init: Callable[[jax.Array], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Wraps the module that `make(rngs)` builds; its structure is traced once, without memory."""
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


def _run_pure(run: BlockRunner, block: nnx.Module, *arrays: Any) -> Any:
    graphdef, state = nnx.split(block)
    return run(lambda params, *xs: nnx.merge(graphdef, params)(*xs), state, *arrays)


def _string_keys(tree: Any) -> Any:
    """nnx.List numbers its children with ints; checkpoints and overviews want strings."""
    return {str(k): _string_keys(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _int_keys(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _int_keys(v) for k, v in tree.items()}
