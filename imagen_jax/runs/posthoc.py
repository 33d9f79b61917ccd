"""Snapshots of the power-function averages of a run, and any width of EMA rebuilt from them."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from tqdm import tqdm

from imagen_jax import ema
from imagen_jax.common.errors import UserError
from imagen_jax.config import Config
from imagen_jax.runs import exported
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.workdir import SNAPSHOTS, read_config
from imagen_jax.sections import CheckpointConfig

# Largest relative error of a rebuilt profile. The weights' own error is then about 1%.
MOST_ERROR = 0.1


def open_snapshots(
    workdir: epath.PathLike, config: Config
) -> contextlib.AbstractContextManager[Checkpoints | None]:
    """Opens the snapshots of a run for writing; None if it keeps no averages."""
    if not config.ema.widths:
        return contextlib.nullcontext()
    # Keeps the snapshots at multiples of snapshot_every, and the newest, of the last step.
    kept = CheckpointConfig(max_to_keep=1, keep_every=config.ema.snapshot_every)
    return contextlib.closing(Checkpoints(workdir, kept, SNAPSHOTS))


def newest_snapshot(workdir: epath.PathLike) -> int:
    """Returns the step of a run's newest snapshot; raises UserError if there is none."""
    with _reading(workdir, read_config(workdir)) as snapshots:
        return snapshots.existing_step()


def rebuild_ema(
    workdir: epath.PathLike,
    config: Config,
    abstract_params: Any,
    width: float,
    step: int | None = None,
) -> Any:
    """Returns the average of a width at `step` (default: the newest snapshot).

    Args:
      config: the run's config.
      abstract_params: shapes, dtypes and shardings of the weights.
      width: sigma_rel, see imagen_jax.ema.

    Raises:
      UserError: the width is out of range, the run has no such snapshot, or its snapshots are too
        few to rebuild the width.
    """
    if not ema.NARROWEST <= width <= ema.WIDEST:
        raise UserError(f"--ema is {width:g}; allowed: {ema.NARROWEST} to {ema.WIDEST}")
    widths = config.ema.widths
    with _reading(workdir, config) as snapshots:
        step = snapshots.existing_step(step)
        steps = [s for s in snapshots.steps() if s <= step]
        pairs = [(s, w) for s in steps for w in widths]
        weights, error = ema.coefficients(*zip(*pairs, strict=True), step, width)
        if error > MOST_ERROR:
            raise UserError(
                f"--ema is {width:g}, which the {len(steps)} snapshots up to step {step} cannot "
                f"rebuild; choose a width nearer to {widths}, or train with a lower "
                "--config.ema.snapshot_every"
            )
        total = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype, device=x.sharding), abstract_params
        )
        target = (abstract_params,) * len(widths)
        rows = zip(steps, weights.reshape(-1, len(widths)), strict=True)
        for s, row in tqdm(rows, "rebuilding the EMA", len(steps), unit="snapshot"):
            averages, _ = snapshots.restore(target, config.identity, s)
            total = _add(total, averages, row.astype("float32"))
    return total


def _reading(
    workdir: epath.PathLike, config: Config
) -> contextlib.AbstractContextManager[Checkpoints]:
    if exported.is_exported(workdir):
        raise UserError(
            f"--ema is set, but {workdir} is an exported model, which has one average; export "
            "another with: python -m imagen_jax.export --workdir=RUN --ema=WIDTH"
        )
    if not config.ema.widths:
        raise UserError(
            f"--ema is set, but {workdir} keeps no snapshots; train with "
            '--config.ema.widths="(0.05,0.1)" and --config.ema.snapshot_every'
        )
    return contextlib.closing(Checkpoints(workdir, folder=SNAPSHOTS))


@functools.partial(jax.jit, donate_argnums=(0,))
def _add(total: Any, averages: tuple[Any, ...], weights: jax.Array) -> Any:
    for average, weight in zip(averages, weights, strict=True):
        total = jax.tree.map(lambda t, a, w=weight: t + w * a, total, average)
    return total
