"""Held-out loss by log-SNR, with the same noise for every checkpoint and run.

Each example has one loss per bucket of log-SNR. Its noise depends on the seed, the example and the
bucket alone, so the losses of two checkpoints, or of two runs on the same data, differ only by the
network, and their paired difference has a small standard error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from imagen_jax.diffusion.conditioning import stack_text
from imagen_jax.diffusion.loss import LOG_SNR_EDGES
from imagen_jax.evaluation.metric import Example, Metric, Row, Table
from imagen_jax.stage import Params, Stage, batch_size


def _cell(row: Row) -> str:
    return f"{row['loss']:.4f} ({row['low']:.4f}-{row['high']:.4f})"


METRIC = Metric(
    "How well does the network denoise?",
    "Mean squared error of eps on held-out examples by log-SNR (low is noisy), with 95% intervals. "
    "All columns have the same noise.",
    lambda images, examples: {},  # of examples alone, see `measure`
    _cell,
    {"loss": "eps-MSE, log-SNR uniform within each bucket, EMA weights"},
)


def buckets(low: float, high: float) -> list[tuple[int, float, float]]:
    """Returns the index and the bounds of each bucket of log-SNR between a schedule's bounds."""
    edges = [-math.inf, *LOG_SNR_EDGES, math.inf]
    clipped = [(i, max(a, low), min(b, high)) for i, (a, b) in enumerate(itertools.pairwise(edges))]
    return [(i, a, b) for i, a, b in clipped if a < b]


def measure(
    stage: Stage,
    params: Params,
    examples: Sequence[Example],
    seed: int = 0,
    progress: bool = True,
) -> Table:
    """Measures the loss of every example in every bucket.

    Args:
      params: the weights, usually the EMA.
      examples: with image [H, W, 3] at the network's size, text and text_mask.
      seed: seed of the noise.
      progress: show a progress bar.

    Returns:
      {"-3 to -1": {"loss": mean over the examples, "low" and "high": its 95% interval, "num":
      number of examples, "scores": the loss of each example}}.
    """
    size = min(batch_size(stage.config.unet.image_size), len(examples))
    size = -(-size // stage.batch_ways) * stage.batch_ways
    found = buckets(stage.schedule.log_snr_min, stage.schedule.log_snr_max)
    losses: dict[int, list[float]] = {i: [] for i, _, _ in found}
    starts = range(0, len(examples), size)
    for start in tqdm(starts, "held-out losses", unit="batch", disable=not progress):
        rows = np.minimum(np.arange(start, start + size), len(examples) - 1)
        some = [examples[r] for r in rows]
        batch = stage.put({"image": np.stack([e["image"] for e in some]), **stack_text(some)})
        for i, low, high in found:
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), start), i)
            args = (params, batch, key, np.float32(low), np.float32(high))
            values = np.asarray(jax.device_get(stage.losses_between(*args)), np.float64)
            losses[i] += values[:size][: len(examples) - start].tolist()
    return {f"{low:g} to {high:g}": _row(losses[i]) for i, low, high in found}


def _row(values: list[float]) -> Row:
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    low, high = mean - 1.96 * error, mean + 1.96 * error
    return {"loss": mean, "low": low, "high": high, "num": len(values), "scores": values}
