"""The cascade: a base model samples, super-resolution stages enlarge (section 2.4).

pipe = load("runs/demo", "runs/demo_sr")
images = pipe(["a red circle"], guidance=3, seed=0)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from imagen_jax.common import cli
from imagen_jax.common.buckets import to_path
from imagen_jax.diffusion.conditioning import pad_text, shrink, shrink_pixels
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.pipeline.images import read_inputs
from imagen_jax.pipeline.prompts import Request, make_requests
from imagen_jax.pipeline.settings import SettingError, Settings, samplers
from imagen_jax.pipeline.trained import TrainedStage
from imagen_jax.released import SCENES
from imagen_jax.runs import exported
from imagen_jax.runs import workdir as runs
from imagen_jax.runs.checkpoint import newest_step
from imagen_jax.runs.posthoc import newest_snapshot
from imagen_jax.stage import batch_size
from imagen_jax.stage import load as load_stage
from imagen_jax.text import TextEncoder, load_encoder


@dataclasses.dataclass(frozen=True)
class Job:
    """One call of a cascade: everything its samples depend on, apart from the weights.

    Attributes:
      requests: one per sample.
      samplers: one per stage.
      inputs: the arrays that all samples start from, see `images.read_inputs`.
      batch_size: samples per batch at 64x64 pixels and below.
      truncate_prompts: whether to truncate prompts that are too long, instead of refusing them.
    """

    requests: list[Request]
    samplers: list[SamplerConfig]
    inputs: dict[str, np.ndarray]
    batch_size: int
    truncate_prompts: bool


class Cascade:
    """Trained stages, in order; calling it samples prompts.

    Each text encoder is loaded at the first prompt that needs it, and kept.

    Attributes:
      stages: the stages.
    """

    def __init__(
        self,
        stages: Sequence[TrainedStage],
        encoders: Callable[[str, int], TextEncoder] | None = None,
    ):
        """Makes a cascade.

        Args:
          encoders: (name or folder, max_tokens) -> a text encoder (default: text.load_encoder).

        Raises:
          SettingError: a stage does not enlarge the samples of the one before.
        """
        self.stages = list(stages)
        self._load_encoder = functools.cache(encoders or load_encoder)
        for before, after in zip(self.stages, self.stages[1:], strict=False):
            if after.low_res != before.size:
                kind = f"enlarges {after.low_res} pixels" if after.low_res else "is a base model"
                raise SettingError(
                    f"workdir: {after.name} {kind}, but follows {before.name}, "
                    f"which samples {before.size} pixels"
                )

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        return_stages: bool = False,
        progress: bool = True,
        **settings: Any,
    ) -> list[Image.Image] | list[list[Image.Image]]:
        """Samples images for prompts.

        Args:
          prompts: one prompt or a list of prompts.
          return_stages: return the images of every stage.
          progress: show a progress bar per stage.
          **settings: the attributes of `settings.Settings`: guidance=3, seed=0, num=4, ...

        Returns:
          The last stage's images: num per prompt, prompt by prompt, or the frames in order. With
          return_stages, one such list per stage.

        Raises:
          UserError: a setting is out of range, would have no effect, or does not suit the stages.
          TypeError: there is no such setting.
        """
        parsed = Settings(**settings)
        job = self.prepare(make_requests(prompts, parsed), parsed)
        images: list[list[Image.Image]] = [[] for _ in self.stages]
        for _, samples in self.sample(job, progress=progress):
            for found, batch in zip(images, samples, strict=True):
                found.extend(map(Image.fromarray, batch))
        return images if return_stages else images[-1]

    def prepare(self, requests: list[Request], settings: Settings) -> Job:
        """Checks the settings against the stages, and reads the images they name.

        Raises:
          UserError: as for `__call__`.
        """
        first, last = self.stages[0], self.stages[-1]
        if first.low_res and settings.image is None:
            raise SettingError(
                f"workdir: {first.name} enlarges {first.low_res} pixels, but is the first stage; "
                "give an image to enlarge, or put a base model before it"
            )
        configs = [stage.stage.config for stage in self.stages]
        return Job(
            requests,
            samplers(settings, configs),
            read_inputs(settings, first.low_res, last.size),
            settings.batch_size,
            settings.truncate_prompts,
        )

    def sample(
        self, job: Job, rows: Sequence[int] | None = None, progress: bool = True
    ) -> Iterator[tuple[list[int], list[np.ndarray]]]:
        """Samples batch by batch, each through all stages.

        Args:
          job: from `prepare`.
          rows: indices of the requests to sample (default: all).
          progress: show a progress bar per stage.

        Yields:
          The rows of a batch and, for each stage, their samples, uint8 [B, H, W, 3]. A sample
          depends on its own request only, not on its batch.

        Raises:
          UserError: a prompt is too long, before the first batch.
        """
        rows = list(range(len(job.requests)) if rows is None else rows)
        if not rows:
            return
        self.check_lengths(job)
        size = batch_size(self.stages[0].size, job.batch_size)
        with contextlib.ExitStack() as stack:
            bars = [
                stack.enter_context(
                    tqdm(total=len(rows), desc=s.name, unit="image", disable=not progress)
                )
                for s in self.stages
            ]
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                yield batch, self._sample_batch(job, [job.requests[i] for i in batch], bars)

    def _sample_batch(self, job: Job, requests: list[Request], bars: list[tqdm]) -> list[Any]:
        seeds = np.array([r.seed for r in requests], np.uint32)
        samples: list[np.ndarray] = []
        for stage, sampler, bar in zip(self.stages, job.samplers, bars, strict=True):
            cond = self.conditioning(stage, job, requests, samples[-1] if samples else None)
            size = batch_size(stage.size, job.batch_size)
            samples.append(stage.stage.sample(stage.params, seeds, cond, sampler, size, bar.update))
        return samples

    def conditioning(
        self,
        stage: TrainedStage,
        job: Job,
        requests: list[Request],
        low_res: np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Returns the host arrays that the samples of a stage depend on: text, inputs, low_res.

        Args:
          requests: those of a batch.
          low_res: the samples of the stage before, uint8 [B, h, w, 3]; None for the first stage.
        """
        cond = self._text_cond(stage, requests, job.truncate_prompts)
        for name, array in _inputs_of(stage, job.inputs).items():
            cond[name] = np.repeat(array[None], len(requests), axis=0)
        return cond if low_res is None else cond | {"low_res": low_res}

    def _text_cond(
        self, stage: TrainedStage, requests: list[Request], truncate: bool
    ) -> dict[str, np.ndarray]:
        """Returns the conditioning on the host: text [N, T, D], text_mask [N, T], and more."""

        def encode(captions: Sequence[str]) -> dict[str, np.ndarray]:
            embeddings = []
            for encoder in self._encoders(stage):
                texts = [encoder.truncate(c) for c in captions] if truncate else captions
                embeddings.append(encoder.encode(texts))
            return pad_text(stage.stage.config.text.parts, *embeddings)

        starts, ends, negatives = zip(
            *(r.texts(bool(stage.low_res)) for r in requests), strict=True
        )
        cond = encode(starts)
        if requests[0].to_prompt:
            end = encode(ends)
            f = np.array([r.fraction for r in requests])[:, None]
            mixed = (1 - f[..., None]) * cond["text"] + f[..., None] * end["text"]
            cond["text"] = mixed.astype(cond["text"].dtype)
            # The first and last frame see the tokens of their own prompt only.
            cond["text_mask"] = (cond["text_mask"] & (f < 1)) | (end["text_mask"] & (f > 0))
        if requests[0].negative_prompt:
            cond |= {f"negative_{k}": v for k, v in encode(negatives).items()}
        if requests[0].to_seed is not None:
            cond["to_seed"] = np.array([r.to_seed for r in requests], np.uint32)
            cond["fraction"] = np.array([r.fraction for r in requests], np.float32)
        return cond

    def _encoders(self, stage: TrainedStage) -> list[TextEncoder]:
        parts = stage.stage.config.text.parts
        return [self._load_encoder(part.encoder, part.max_tokens) for part in parts]

    def takes(self, prompt: str) -> bool:
        """Returns whether a prompt is short enough for the text encoders of all stages."""
        encoders = (encoder for stage in self.stages for encoder in self._encoders(stage))
        return all(e.num_tokens(prompt) <= e.max_tokens for e in encoders)

    def check_lengths(self, job: Job) -> None:
        """Raises UserError for a prompt that is too long; logs it if it will be truncated."""
        captions: dict[TextEncoder, dict[str, None]] = {}
        for stage in self.stages:
            texts = [t for r in job.requests for t in r.texts(bool(stage.low_res))]
            for encoder in self._encoders(stage):
                captions.setdefault(encoder, {}).update(dict.fromkeys(texts))
        for encoder, caption in ((e, c) for e, found in captions.items() for c in found):
            tokens, most = encoder.num_tokens(caption), encoder.max_tokens
            if tokens <= most:
                continue
            if not job.truncate_prompts:
                shown = caption if len(caption) <= 40 else caption[:37] + "..."
                raise SettingError(
                    f"truncate_prompts is needed: prompt {shown!r} has {tokens} tokens, and the "
                    f"text encoder takes {most}"
                )
            kept = encoder.truncate(caption)
            cli.log.info("prompt truncated from %d to %d tokens: %r", tokens, most, kept)


def _inputs_of(stage: TrainedStage, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the inputs that a stage reads, at its size."""
    if "image" not in inputs:
        return inputs
    if stage.low_res and "mask" not in inputs:
        return {}  # only the base model starts from the image
    scaled = {"image": shrink_pixels(inputs["image"][None], stage.size)[0]}
    if "mask" in inputs:
        # Repaint a pixel if any of the full-size pixels it covers is to be repainted.
        mask = inputs["mask"][None].astype(np.float32)
        scaled["mask"] = shrink(mask, stage.size)[0] > 0
    return scaled


def load(
    *workdirs: str | os.PathLike,
    step: int | None = None,
    ema: float | Sequence[float] | None = None,
    raw: bool = False,
) -> Cascade:
    """Loads trained runs or exported models as a cascade.

    Args:
      workdirs: a run, or the runs of a cascade in order; an exported cascade counts as its stages
        (default: the released cascade of scenes).
      step: checkpoint step to load (default: the newest of each run).
      ema: width of the average to rebuild, or one per run, see `stage.load`.
      raw: load the weights themselves instead of their EMA.

    Raises:
      UserError: a workdir holds no run or no such checkpoint, or the runs do not form a cascade.
    """
    workdirs = tuple(runs.stages_of(workdirs or [SCENES]))
    widths = list(ema) if isinstance(ema, Sequence) else [ema]
    if len(widths) not in (1, len(workdirs)):
        allowed = f"1, or one per stage ({len(workdirs)})"
        raise SettingError(f"ema has {len(widths)} values; allowed: {allowed}")
    stages = []
    for i, workdir in enumerate(map(to_path, workdirs)):
        width = widths[i % len(widths)]
        newest = newest_step if width is None else newest_snapshot
        found = newest(workdir) if step is None else step
        loaded = load_stage(workdir, found, width, raw)
        record = exported.read(workdir) if exported.is_exported(workdir) else {}
        stages.append(TrainedStage(str(workdir), found, *loaded, width, record))
    return Cascade(stages)
