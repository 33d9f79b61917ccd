"""Learning-rate schedules, optimizers by name, and the EMA of the weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imagen_jax.common.typed_config import require

LR_SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Config section `optimizer`.

    Prefer Adam for runs below about 200,000 steps. Adafactor multiplies each update by
    max(RMS of the weight, 1e-3), so at a learning rate of 1e-4 a convolution initialized to zero
    needs 10,000 steps to reach an RMS of 1e-3 and 40,000 to reach 0.02. Warm-up adds to that.

    Attributes:
      name: a key of OPTIMIZERS. The paper uses Adafactor with optax's defaults for the base model
        (appendix F.1) and Adam for super-resolution (appendices F.2 and F.3).
      learning_rate: peak rate; for Adafactor, relative to the RMS of each weight. For Muon, that of
        the matrices: each update has singular values of about the rate, 0.02 by its author.
      adam_learning_rate: Muon only: peak rate of Adam, which updates the other weights; None is
        learning_rate.
      warmup_steps: steps of linear warm-up from 0.
      schedule: "cosine" decays to 0 at the last step (the paper prints end_value=2500000, which is
        the number of steps: a misprint); "constant" stays at the peak.
      weight_decay: decoupled: each step subtracts learning rate x weight_decay x weight. It means
        the same for all but adam, which allows only 0.
      b1, b2: decay rates of the moments; Adafactor has its own, and so do Muon's matrices.
      eps: added to the denominator; Adam, AdamW and Muon only.
      grad_clip: largest global norm of the gradients; 0 turns clipping off.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-4
    adam_learning_rate: float | None = None
    warmup_steps: int = 10_000
    schedule: str = "cosine"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    grad_clip: float = 0.0

    def __post_init__(self):
        require(self.name in OPTIMIZERS, "optimizer.name", self.name, ", ".join(OPTIMIZERS))
        allowed = ", ".join(LR_SCHEDULES)
        require(self.schedule in LR_SCHEDULES, "optimizer.schedule", self.schedule, allowed)
        for key in ("learning_rate", "weight_decay"):
            ok = 0 <= getattr(self, key) <= 1000
            require(ok, f"optimizer.{key}", getattr(self, key), "0 to 1000")
        for key in ("warmup_steps", "grad_clip"):
            require(getattr(self, key) >= 0, f"optimizer.{key}", getattr(self, key), "0 or more")
        if self.name == "muon":
            allowed = "above 0 for muon"
            require(self.learning_rate > 0, "optimizer.learning_rate", self.learning_rate, allowed)
        rate = self.adam_learning_rate
        ok = rate is None or (self.name == "muon" and rate >= 0)
        require(ok, "optimizer.adam_learning_rate", rate, "0 or more with name=muon, else None")
        for key in ("b1", "b2"):
            ok = 0 <= getattr(self, key) < 1
            require(ok, f"optimizer.{key}", getattr(self, key), "0 or more, below 1")
        require(0 < self.eps <= 1, "optimizer.eps", self.eps, "above 0, up to 1")
        allowed = "0 for adam; for weight decay set config.optimizer.name=adamw"
        decays = self.name != "adam" or self.weight_decay == 0
        require(decays, "optimizer.weight_decay", self.weight_decay, allowed)


def adafactor(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Builds optax.adafactor with its defaults, plus decoupled weight decay.

    optax's own weight_decay_rate is not scaled by the learning rate: 0.01 would remove 1% of every
    weight at each step.
    """
    update = optax.adafactor(rate)
    if not config.weight_decay:
        return update
    decay = optax.add_decayed_weights(lambda step: -rate(step) * config.weight_decay)
    return optax.chain(update, decay)


# Parts of a network whose matrices Muon leaves to Adam: the first and the last layers, the
# embeddings of time and text, and the transformer's modulation, which starts at zero.
NOT_HIDDEN = {"conditioner", "stem", "head", "patches", "text", "modulation"}


def is_hidden_matrix(path: tuple, x: Any) -> bool:
    """Returns whether Muon updates a weight: the kernels outside NOT_HIDDEN."""
    names = [entry.key for entry in path]
    return NOT_HIDDEN.isdisjoint(names) and names[-1] == "kernel" and x.ndim >= 2


def stack_matrices(tree: Any) -> dict[str, dict[str, jax.Array]]:
    """Stacks the hidden matrices of each shape, [n, ...], under "muon"; others go under "adam".

    Muon's program grows with the number of arrays, and a network has few shapes.
    """
    stacks: dict[str, list[jax.Array]] = {}
    others = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if is_hidden_matrix(path, x):
            stacks.setdefault(str(x.shape), []).append(x)
        else:
            others[jax.tree_util.keystr(path, simple=True, separator=".")] = x
    return {"muon": {shape: jnp.stack(xs) for shape, xs in stacks.items()}, "adam": others}


def unstack_matrices(stacked: dict[str, dict[str, jax.Array]], like: Any) -> Any:
    """Reverses stack_matrices for a tree of the structure and shapes of `like`."""
    rows = {shape: iter(stack) for shape, stack in stacked["muon"].items()}

    def leaf(path, x):
        if is_hidden_matrix(path, x):
            return next(rows[str(x.shape)])
        return stacked["adam"][jax.tree_util.keystr(path, simple=True, separator=".")]

    return jax.tree_util.tree_map_with_path(leaf, like)


def _dimension_numbers(stacked: Any) -> Any:
    """Returns which axes of each stack are the matrix, for optax; None for Adam's weights.

    A convolution [h, w, in, out] is the matrix [h w in, out], as in Muon's reference code. A kernel
    with an odd number of axes, [L, ...], is L matrices, one for each layer.
    """

    def of(path, x):
        first = 2 - x.ndim % 2  # the stack has one axis more than the kernel
        inputs = tuple(range(first, x.ndim - 1))
        numbers = optax.contrib.MuonDimensionNumbers(inputs, x.ndim - 1)
        return numbers if path[0].key == "muon" else None

    return jax.tree_util.tree_map_with_path(of, stacked)


def muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    """Builds Muon for the hidden matrices and Adam, with Nesterov momentum, for all other weights.

    Muon orthogonalizes the momentum (decay 0.95) of a matrix by five Newton-Schulz steps and scales
    it by sqrt(max(1, out / in)). Source: https://kellerjordan.github.io/posts/muon.
    """
    peak = config.learning_rate
    ratio = 1.0 if config.adam_learning_rate is None else config.adam_learning_rate / peak
    inner = optax.contrib.muon(
        rate,
        weight_decay=config.weight_decay,
        eps=config.eps,
        adam_b1=config.b1,
        adam_b2=config.b2,
        adam_weight_decay=config.weight_decay,
        adam_learning_rate=lambda step: rate(step) * ratio,
        muon_weight_dimension_numbers=_dimension_numbers,
    )

    def update(grads, state, params=None):
        weights = None if params is None else stack_matrices(params)
        updates, state = inner.update(stack_matrices(grads), state, weights)
        return unstack_matrices(updates, grads), state

    return optax.GradientTransformation(lambda p: inner.init(stack_matrices(p)), update)


# name -> (config, learning rate) -> transformation.
MakeOptimizer = Callable[[OptimizerConfig, optax.Schedule], optax.GradientTransformation]
OPTIMIZERS: dict[str, MakeOptimizer] = {
    "adafactor": adafactor,
    "adam": lambda c, rate: optax.adam(rate, c.b1, c.b2, c.eps),
    "adamw": lambda c, rate: optax.adamw(rate, c.b1, c.b2, c.eps, weight_decay=c.weight_decay),
    "lion": lambda c, rate: optax.lion(rate, c.b1, c.b2, weight_decay=c.weight_decay),
    "muon": muon,
}


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate by step: linear warm-up, then cosine to 0 or constant."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))
    if config.schedule == "constant":
        # optax stays at the initial value, 0, if the warm-up has no steps.
        rise = optax.warmup_constant_schedule(0.0, config.learning_rate, warmup)
        return rise if warmup else optax.constant_schedule(config.learning_rate)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Builds the optax chain: optional clipping by the global norm, then the named optimizer."""
    update = OPTIMIZERS[config.name](config, learning_rate(config, num_steps))
    clip = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip else []
    return optax.chain(*clip, update)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """Updates ema <- d ema + (1 - d) params, where d = min(decay, (1 + step) / (10 + step)).

    The warm-up of d makes the EMA usable from the first samples on. After a few multiples of
    1 / (1 - decay) steps it is an ordinary EMA.
    """
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
