"""The training state and the pure training step: loss, gradients, optimizer, EMA."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imagen_jax.diffusion.loss import LOG_SNR_EDGES
from imagen_jax.ema import update_averages
from imagen_jax.optim import update_ema

Batch = dict[str, jax.Array]
LossFn = Callable[[Any, Batch, jax.Array], tuple[jax.Array, jax.Array]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that training changes. All leaves are arrays.

    Attributes:
      step: number of steps taken.
      params: the weights.
      ema: their EMA, which evaluation and sampling use.
      opt_state: the state of the optimizer.
      averages: their averages for post-hoc EMA, one per width in the config section `ema`.
    """

    step: jax.Array
    params: Any
    ema: Any
    opt_state: Any
    averages: tuple[Any, ...] = ()


def init_state(
    params: Any, optimizer: optax.GradientTransformation, num_averages: int = 0
) -> TrainState:
    """Returns the state at step 0; the EMA and the averages start as copies of the weights."""
    ema, *averages = (jax.tree.map(jnp.copy, params) for _ in range(1 + num_averages))
    opt_state = optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, ema, opt_state, tuple(averages))


def _bucket_sums(loss_b: jax.Array, log_snr_b: jax.Array) -> dict[str, jax.Array]:
    """Returns the sum of losses and the number of examples per log-SNR bucket, [buckets] each."""
    index = jnp.searchsorted(jnp.asarray(LOG_SNR_EDGES), log_snr_b)
    one_hot = jax.nn.one_hot(index, len(LOG_SNR_EDGES) + 1)
    return {"bucket_loss": loss_b @ one_hot, "bucket_count": one_hot.sum(0)}


def _gradients(loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array):
    def mean_loss(params):
        loss_b, log_snr_b = loss_fn(params, batch, key)
        return loss_b.mean(), _bucket_sums(loss_b, log_snr_b)

    (loss, buckets), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
    return grads, {"loss": loss, **buckets}


def accumulated_gradients(
    loss_fn: LossFn, params: Any, batch: Batch, key: jax.Array, microbatches: int
):
    """Averages the gradients and the loss over equal microbatches; sums the log-SNR buckets.

    Microbatches are strided: example i is in microbatch i % microbatches. A batch sharded over
    devices therefore splits into microbatches that are also sharded over all of them.
    """
    if microbatches == 1:
        return _gradients(loss_fn, params, batch, key)

    def split(x):
        return jnp.moveaxis(x.reshape(-1, microbatches, *x.shape[1:]), 1, 0)

    def part(index, piece):
        return _gradients(loss_fn, params, piece, jax.random.fold_in(key, index))

    def body(total, indexed):
        return jax.tree.map(jnp.add, total, part(*indexed)), None

    parts = (jnp.arange(microbatches), jax.tree.map(split, batch))
    shapes = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    (grads, metrics), _ = jax.lax.scan(body, zeros, parts)
    grads = jax.tree.map(lambda g: g / microbatches, grads)
    return grads, {**metrics, "loss": metrics["loss"] / microbatches}


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    ema_decay: float,
    seed: int,
    microbatches: int = 1,
    widths: Sequence[float] = (),
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Runs one training step.

    A step whose loss or gradient norm is not finite changes nothing but the step counter.

    Args:
      state: donated by the caller's jit.
      batch: arrays [B, ...]; B is a multiple of `microbatches`.
      loss_fn: (params, batch, key) -> (loss [B], log_snr [B]).
      seed: seeds all randomness, together with the step, so a resumed run repeats exactly.
      widths: the widths of state.averages.

    Returns:
      The new state, and the metrics: scalars loss, grad_norm and skipped, and sums per log-SNR
      bucket.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    grads, metrics = accumulated_gradients(loss_fn, state.params, batch, key, microbatches)
    metrics["grad_norm"] = optax.global_norm(grads)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["grad_norm"])

    def update(state, grads):
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = update_ema(state.ema, params, ema_decay, state.step)
        averages = update_averages(state.averages, params, widths, state.step)
        return TrainState(state.step + 1, params, ema, opt_state, averages)

    def skip(state, grads):
        return dataclasses.replace(state, step=state.step + 1)

    # A branch leaves the arithmetic of the update as it is. Selecting between the old and the new
    # state would let XLA fuse it otherwise, which changes the rounding of Adafactor.
    state = jax.lax.cond(finite, update, skip, state, grads)
    return state, metrics | {"skipped": ~finite}


def all_finite(state: TrainState) -> jax.Array:
    """Returns whether all numbers of a state are finite, bool []."""
    return jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state)]).all()
