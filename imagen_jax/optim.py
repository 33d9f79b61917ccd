"""Learning-rate schedules, optax chains by name, and the exponential moving average of weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imagen_jax.common.typed_config import require

OPTIMIZERS = ("adafactor", "adam", "adamw", "lion")
LR_SCHEDULES = ("cosine", "constant")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Config section `optimizer`.

    Attributes:
      name: one of OPTIMIZERS. Adafactor with optax's defaults is the paper's choice for the base
        model (appendix F.1); Adam is its choice for super-resolution.
      learning_rate: peak rate. Under Adafactor it is relative to the scale of each weight, since
        optax.adafactor multiplies updates by the parameter's RMS by default.
      warmup_steps: linear warm-up from 0.
      schedule: "cosine" decays to 0 at the last step (the paper prints end_value=2500000, a
        misprint for the number of steps), "constant" stays at the peak.
      grad_clip: clip the global gradient norm to this; 0 leaves gradients alone.
    """

    name: str = "adafactor"
    learning_rate: float = 1e-4
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
        for key in ("learning_rate", "warmup_steps", "weight_decay", "grad_clip"):
            require(getattr(self, key) >= 0, f"optimizer.{key}", getattr(self, key), "0 or more")


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """The rate as a function of the step: linear warm-up, then cosine to 0 or constant."""
    warmup = min(config.warmup_steps, max(num_steps - 1, 0))
    if config.schedule == "constant":
        # A warm-up of no length would stay at its initial 0.
        rise = optax.warmup_constant_schedule(0.0, config.learning_rate, warmup)
        return rise if warmup else optax.constant_schedule(config.learning_rate)
    return optax.warmup_cosine_decay_schedule(0.0, config.learning_rate, warmup, num_steps)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """The optax chain: optional clipping of the global norm, then the named optimizer."""
    rate = learning_rate(config, num_steps)
    decay = config.weight_decay
    if config.name == "adafactor":
        update = optax.adafactor(rate, weight_decay_rate=decay or None)
    elif config.name == "adam":
        update = optax.adam(rate, config.b1, config.b2, config.eps)
    elif config.name == "adamw":
        update = optax.adamw(rate, config.b1, config.b2, config.eps, weight_decay=decay)
    else:
        update = optax.lion(rate, config.b1, config.b2, weight_decay=decay)
    clip = [optax.clip_by_global_norm(config.grad_clip)] if config.grad_clip else []
    return optax.chain(*clip, update)


def update_ema(ema: Any, params: Any, decay: float, step: jax.Array) -> Any:
    """ema <- d ema + (1 - d) params, with d warmed up as min(decay, (1 + step) / (10 + step)).

    The warm-up makes the average usable from the first samples on; after a few multiples of
    1 / (1 - decay) steps it is the plain average.
    """
    step = step.astype(jnp.float32)
    d = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p - e), ema, params)
