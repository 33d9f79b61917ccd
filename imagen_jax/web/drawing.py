"""Draws one request of the page and describes each moment of it as a JSON object."""

from __future__ import annotations

import io
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from imagen_jax.common import html
from imagen_jax.pipeline.cascade import Cascade, Job
from imagen_jax.pipeline.prompts import make_requests
from imagen_jax.pipeline.stepping import Frame, Stepper
from imagen_jax.web import requests
from imagen_jax.web.requests import Drawing

# (image uint8 [H, W, 3], prompt) -> each claim in words and whether it holds; None: not known.
Check = Callable[[np.ndarray, str], list[tuple[str, bool]] | None]

FRAME_SECONDS = 0.15  # at least this long between two previews
LOSSLESS = 128  # pixels; larger previews are lossy


class Model(NamedTuple):
    """What the page draws with.

    Attributes:
      pipe: the cascade.
      title: its name on the page.
      arguments: the command-line arguments that make imagen_jax.sample open it.
      examples: prompts to offer.
      check: decides which claims of a prompt an image satisfies.
    """

    pipe: Cascade
    title: str
    arguments: Sequence[str] = ()
    examples: Callable[[], Sequence[str]] = tuple
    check: Check = lambda image, prompt: None


def describe(model: Model) -> dict[str, Any]:
    """Returns what the page needs to know: stages with their defaults, limits and examples."""
    stages = []
    for stage in model.pipe.stages:
        s = stage.stage.config.sampling
        defaults = {"steps": s.num_steps, "guidance": s.guidance_weight}
        defaults |= {"sampler": s.name, "threshold": s.threshold}
        stages.append({"size": stage.size, "step": stage.step, "defaults": defaults})
    return {
        "title": model.title,
        "stages": stages,
        "needs_image": bool(model.pipe.stages[0].low_res),
        "numbers": {n: [low, high] for n, (_, low, high) in requests.NUMBERS.items()},
        "choices": requests.CHOICES,
        "max_prompt": requests.MAX_PROMPT,
        "examples": list(model.examples()),
    }


def prepare(model: Model, drawing: Drawing) -> Job:
    """Checks a request against the stages and the text encoders.

    Raises:
      UserError: a setting does not suit the stages, or the prompt is too long.
    """
    settings = drawing.settings
    job = model.pipe.prepare(make_requests(drawing.prompt, settings), settings)
    model.pipe.check_lengths(job)
    return job


def events(model: Model, stepper: Stepper, drawing: Drawing, job: Job) -> Iterator[dict[str, Any]]:
    """Draws, and yields an event per preview and one at the end.

    Yields:
      {stage, size, done, total, eta, image}: the picture of a stage after `done` of `total`
      evaluations; eta in seconds for the rest of the stage, or None; image a data URL, or None
      before the first. Then {claims, seconds, command}.
    """
    began = time.monotonic()
    shown = first = began
    image = None
    for frame in stepper.frames(job):
        now = time.monotonic()
        last = frame.done == frame.total
        if frame.done == 1:
            first = now  # the first evaluation compiles
        if frame.done > 1 and not last and now - shown < FRAME_SECONDS:
            continue
        shown, image = now, frame.image
        yield {
            "stage": frame.stage,
            "size": model.pipe.stages[frame.stage].size,
            "done": frame.done,
            "total": frame.total,
            "eta": _eta(frame, now - first),
            "image": None if image is None else data_url(image, last),
        }
    claims = model.check(image, drawing.prompt)
    yield {
        "claims": claims,
        "seconds": time.monotonic() - began,
        "command": command(model, drawing),
    }


def _eta(frame: Frame, seconds: float) -> float | None:
    """Returns the seconds left in a stage, given those since its first evaluation."""
    if frame.done < 2:
        return None
    return seconds / (frame.done - 1) * (frame.total - frame.done)


def data_url(image: np.ndarray, lossless: bool = True) -> str:
    """Encodes a picture for an <img>: as PNG, or a large preview as lossy WebP."""
    file = io.BytesIO()
    kind = "png" if lossless or image.shape[0] <= LOSSLESS else "webp"
    Image.fromarray(image).save(file, kind)
    return html.data_url(kind, file.getvalue())


def command(model: Model, drawing: Drawing) -> str:
    """Returns the command that samples the same picture; "" if there is none.

    --prompts splits at semicolons, and an image would have to be a file.
    """
    s = drawing.settings
    if ";" in drawing.prompt or s.image is not None:
        return ""
    words = ["python", "-m", "imagen_jax.sample", *model.arguments]
    words += [f"--prompts={drawing.prompt}", f"--seed={s.seed}", "--num=1"]
    for name in (*requests.NUMBERS, *requests.CHOICES):
        values = (f"{v:g}" if isinstance(v, float) else str(v) for v in getattr(s, name))
        words.append(f"--{name}={','.join(values)}")
    return shlex.join(words)
