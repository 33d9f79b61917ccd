"""Evaluations during training: the config section `evals`.

Training does not import this module; its command hands it the functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from imagen_jax.common.errors import UserError
from imagen_jax.diffusion.conditioning import shrink_pixels, stack_text
from imagen_jax.evaluation import losses, table
from imagen_jax.evaluation.alignment import Check
from imagen_jax.evaluation.metric import Example, Metric, total, value_of
from imagen_jax.sections import EvalConfig
from imagen_jax.stage import Params, Stage, batch_size

# A judge is not asked during training: a run must not stop because an endpoint does.
LEFT_OUT = ("questions",)


def check_names(names: Iterable[str]) -> None:
    """Raises UserError for a name in config.evals that is no metric of training."""
    own = {*table.NEEDS, table.LOSSES} - {*LEFT_OUT}
    for name in (name for name in names if name not in own):
        allowed = [known for known in table.names() if known not in LEFT_OUT]
        if name not in allowed:
            raise UserError(f"config.evals has {name!r}; allowed: {', '.join(allowed)}")


def evaluations(
    stage: Stage, examples_of: Callable[[str, int], list[Example]], check: Check
) -> dict[str, Callable[[Params], dict[str, float]]]:
    """Returns, for each entry of config.evals, a function from weights to scalars for the log.

    Args:
      examples_of: (split, num) -> examples, as training.reader.Reader.examples.
      check: reads an image of a scene.

    Raises:
      UserError: the captions lack what a metric needs, or its weights are missing.
    """
    found = {}
    for name, entry in stage.config.evaluations.items():
        examples = examples_of(entry.split or stage.config.data.sample_split, entry.num)
        if name == table.LOSSES:
            found[name] = functools.partial(_losses, stage, examples)
            continue
        table.check_suits([name], examples, "")
        metric = table.metrics([name], table.Sources(check))[name]
        found[name] = functools.partial(_measure, name, metric, stage, examples, entry)
    return found


def _losses(stage: Stage, examples: Sequence[Example], params: Params) -> dict[str, float]:
    buckets = losses.measure(stage, params, examples, progress=False)
    return {f"losses/{b.replace(' ', '_')}": row["loss"] for b, row in buckets.items()}


def _measure(
    name: str,
    metric: Metric,
    stage: Stage,
    examples: Sequence[Example],
    entry: EvalConfig,
    params: Params,
) -> dict[str, float]:
    """Samples the captions, always with the same seeds, and measures the images."""
    config, sampler, cond = stage.config, stage.config.sampling, stack_text(examples)
    if entry.guidance is not None:
        sampler = dataclasses.replace(sampler, guidance_weight=entry.guidance)
    if config.unet.low_res:
        true = np.stack([e["image"] for e in examples])
        cond["low_res"] = shrink_pixels(true, config.unet.low_res)
    seeds = np.arange(len(examples), dtype=np.uint32)
    size = batch_size(config.unet.image_size)
    images = stage.sample(params, seeds, cond, sampler, size)
    found = metric.measure(images, examples)
    figures = {k: v for k, v in total(found).items() if isinstance(v, (int, float)) and k != "num"}
    scalars = {f"{name}/{key}": float(value) for key, value in figures.items()}
    groups = {group: value_of(row)[1] for group, row in found.items() if group != "all"}
    return scalars | {f"{name}/{g.replace(' ', '_')}": float(v) for g, v in groups.items()}
