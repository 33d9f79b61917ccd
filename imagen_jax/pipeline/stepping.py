"""Samples one image evaluation by evaluation, so that a display can follow it and stop it.

A program of its own runs one evaluation. Ordinary sampling runs all of them in one program, which
this module leaves alone; the last frame equals its image bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from imagen_jax.diffusion import process
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.pipeline.cascade import Cascade, Job
from imagen_jax.stage import Params, Stage


class Frame(NamedTuple):
    """An image while it is denoised.

    Attributes:
      stage: index of the stage that samples it.
      done: evaluations of that stage so far, from 0.
      total: evaluations that the stage takes.
      image: the stage's x_hat, uint8 [H, W, 3]; None at 0 evaluations.
    """

    stage: int
    done: int
    total: int
    image: np.ndarray | None


class Stepper:
    """Samples the requests of a cascade one at a time, in steps."""

    def __init__(self, cascade: Cascade):
        self._cascade = cascade
        self._programs = [_Programs(stage.stage) for stage in cascade.stages]

    def frames(self, job: Job) -> Iterator[Frame]:
        """Samples the only request of a job; each stage yields its frames in order.

        Raises:
          UserError: the prompt is too long.
          ValueError: the job has several requests.
        """
        [request] = job.requests
        self._cascade.check_lengths(job)
        seeds = np.array([request.seed], np.uint32)
        images = None
        stages = zip(self._cascade.stages, job.samplers, self._programs, strict=True)
        for index, (stage, sampler, programs) in enumerate(stages):
            cond = self._cascade.conditioning(stage, job, [request], images)
            for done, total, images in programs.run(stage.params, seeds, cond, sampler):
                yield Frame(index, done, total, None if images is None else images[0])


class _Programs:
    """The compiled programs of a stage: one starts a run, one advances it by an evaluation."""

    def __init__(self, stage: Stage):
        self._stage = stage
        self._start = jax.jit(self._traced_start, static_argnums=(3,))
        self._advance = jax.jit(self._traced_advance, static_argnums=(3,))

    def run(
        self,
        params: Params,
        seeds: np.ndarray,
        cond: dict[str, np.ndarray],
        sampler: SamplerConfig,
    ) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """Yields evaluations done, evaluations in all, and x_hat as uint8 [N, H, W, 3] or None."""
        # As Stage.sample: a batch that all devices share.
        rows = np.arange(-(-len(seeds) // self._stage.batch_ways) * self._stage.batch_ways)
        rows = np.minimum(rows, len(seeds) - 1)
        inputs = jax.device_put(
            (seeds[rows], {k: v[rows] for k, v in cond.items()}), self._stage.batch_sharding
        )
        carry, indices = self._start(params, *inputs, sampler)
        total = len(indices)
        yield 0, total, None
        for i in range(total):
            carry, x_hat = self._advance(params, *inputs, sampler, carry, np.int32(i))
            yield i + 1, total, process.to_uint8(np.asarray(jax.device_get(x_hat))[: len(seeds)])

    def _traced_start(
        self, params: Params, seeds_b: jax.Array, cond: process.Cond, sampler: SamplerConfig
    ) -> tuple[Any, jax.Array]:
        """Returns the carry before the first evaluation, and the indices of all evaluations."""
        found = []

        def loop(step, carry, times):
            found.append((carry, times[0]))
            return carry

        self._stage.sample_batch(params, seeds_b, cond, sampler, loop)
        return found[0]

    def _traced_advance(
        self,
        params: Params,
        seeds_b: jax.Array,
        cond: process.Cond,
        sampler: SamplerConfig,
        carry: Any,
        index: jax.Array,
    ) -> tuple[Any, jax.Array]:
        """Runs evaluation `index` from `carry`; returns the next carry and the image of x_hat."""
        found = []

        def loop(step, _, times):
            # A loop of one round, not a call: XLA then compiles the same loop body as for `scan`,
            # which keeps the results equal to the last bit.
            def body(i, carry):
                at = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
                return step(carry, jax.tree.map(at, times))

            found.append(jax.lax.fori_loop(index, index + 1, body, carry))
            return found[0]

        image = self._stage.sample_batch(params, seeds_b, cond, sampler, loop)
        return found[0], image
