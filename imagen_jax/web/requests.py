"""Requests of the drawing page, validated: JSON in, a prompt and settings out.

A page that this server did not send can post anything, so every type, length and range is checked
here or by `pipeline.settings`. Errors start with the name of the field.
"""

from __future__ import annotations

import base64
import io
from typing import Any, NamedTuple

from PIL import Image

from imagen_jax.common.errors import UserError
from imagen_jax.diffusion.sampler import THRESHOLDS
from imagen_jax.diffusion.solvers import SOLVERS
from imagen_jax.pipeline.settings import Settings

MAX_PROMPT = 1000  # characters
MAX_SIDE = 4096  # pixels of an uploaded image
MAX_BODY = 24 * 2**20  # bytes of a request: an image and a mask, in base64

# Numbers per stage: name -> type, smallest and largest value.
NUMBERS = {"steps": (int, 1, 1000), "guidance": (float, 0, 100)}
# Choices per stage.
CHOICES = {"sampler": tuple(SOLVERS), "threshold": tuple(THRESHOLDS)}
RESAMPLE = (int, 1, 20)
SEED = (int, 0, 2**32 - 1)
FIELDS = {"prompt", "seed", "stages", "image", "mask", "resample"}


class Drawing(NamedTuple):
    """A valid request.

    Attributes:
      prompt: the prompt.
      settings: the settings, one value per stage.
    """

    prompt: str
    settings: Settings


def parse(fields: Any, num_stages: int) -> Drawing:
    """Checks the decoded JSON of a request.

    Args:
      fields: prompt and seed; stages, a list of {steps, guidance, sampler, threshold} with one
        entry per stage; and optionally image and mask (data URLs) and resample.

    Raises:
      UserError: a field is missing, unknown, of another type or out of range.
    """
    if not isinstance(fields, dict):
        raise UserError("the request must be a JSON object")
    if unknown := fields.keys() - FIELDS:
        raise UserError(f"{min(unknown)[:40]} is not a known field; allowed: {_listed(FIELDS)}")
    prompt = fields.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > MAX_PROMPT:
        raise UserError(f"prompt must be a string of 1 to {MAX_PROMPT} characters")
    values: dict[str, Any] = {"seed": _number("seed", fields.get("seed"), *SEED)}
    stages = fields.get("stages")
    if not isinstance(stages, list) or len(stages) != num_stages:
        raise UserError(f"stages must be a list of {num_stages} objects, one per stage")
    parsed = [_stage(stage) for stage in stages]
    values |= {name: [stage[name] for stage in parsed] for name in (*NUMBERS, *CHOICES)}
    for name in ("image", "mask"):
        if fields.get(name) is not None:
            values[name] = _image(name, fields[name])
    if "mask" in values:
        values["resample"] = _number("resample", fields.get("resample", 4), *RESAMPLE)
    return Drawing(prompt.strip(), Settings(**values))


def _stage(stage: Any) -> dict[str, Any]:
    names = {*NUMBERS, *CHOICES}
    if not isinstance(stage, dict) or stage.keys() != names:
        raise UserError(f"stages: each entry must be an object with {_listed(names)}")
    for name, allowed in CHOICES.items():
        if stage[name] not in allowed:
            raise UserError(f"{name} is {str(stage[name])[:40]!r}; allowed: {', '.join(allowed)}")
    return stage | {n: _number(n, stage[n], *limits) for n, limits in NUMBERS.items()}


def _number(name: str, value: Any, kind: type, low: float, high: float) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high or kind(value) != value:  # NaN is in no range
        what = "a whole number" if kind is int else "a number"
        raise UserError(f"{name} is {str(value)[:40]}; allowed: {what} from {low} to {high}")
    return kind(value)


def _image(name: str, url: Any) -> Image.Image:
    """Decodes an image from a data URL; refuses a large one before its pixels are decoded."""
    head, _, data = url.partition(",") if isinstance(url, str) else ("", "", "")
    if not head.startswith("data:image/") or not head.endswith(";base64"):
        raise UserError(f"{name} must be an image as a base64 data URL")
    try:
        image = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
        large = max(image.size) > MAX_SIDE
        if not large:
            image.load()
    except Exception as e:
        # Decoders raise anything on a broken file.
        raise UserError(f"{name} is not a readable image ({type(e).__name__})") from e
    if large:
        raise UserError(f"{name} is {image.width}x{image.height}; allowed: up to {MAX_SIDE} pixels")
    return image


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
