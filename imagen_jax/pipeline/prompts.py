"""Prompts and pictures that users hand to the samplers: read, checked, one clear line if wrong."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from imagen_jax.common.errors import UserError

COLUMNS = ("prompt", "caption", "text")


@dataclasses.dataclass(frozen=True)
class Request:
    """One picture to draw: all that it depends on besides the stages and the image given.

    Attributes:
      sr_prompt: what the super-resolution stages are told, usually the prompt.
      to_prompt, to_sr_prompt, to_seed: the end of a way of which this is `fraction`, 0 to 1.
    """

    prompt: str
    seed: int
    sr_prompt: str
    negative_prompt: str = ""
    to_prompt: str = ""
    to_sr_prompt: str = ""
    to_seed: int | None = None
    fraction: float = 0.0


def make_requests(
    prompts: list[str],
    sr_prompts: list[str],
    seeds: Sequence[int],
    negative_prompt: str = "",
    frames: int = 0,
    to_seed: int | None = None,
) -> list[Request]:
    """Each prompt with each seed; with frames, so many on each seed's way from start to end.

    Args:
      sr_prompts: none for the same as prompts, one for all, or one for each.
      frames: of the way between two prompts, or from one seed to to_seed, or both.

    Raises:
      UserError: the numbers of these do not go together.
    """
    others = sr_prompts or prompts
    if len(others) not in (1, len(prompts)):
        raise UserError(f"--sr_prompts has {len(others)} prompts; allowed: 1 or {len(prompts)}")
    others = others * len(prompts) if len(others) == 1 else others
    if not frames:
        if to_seed is not None:
            raise UserError(f"--to_seed={to_seed} needs --frames, how many to draw")
        pairs = zip(prompts, others, strict=True)
        return [Request(p, s, o, negative_prompt) for p, o in pairs for s in seeds]
    if frames < 2 or len(prompts) > 2 or (len(prompts) == 1 and to_seed is None):
        raise UserError(
            f"--frames={frames} with {len(prompts)} prompts; allowed: 2 frames or more between "
            "2 prompts, or of 1 prompt with --to_seed"
        )
    return [
        Request(
            prompts[0], seed, others[0], negative_prompt,
            prompts[-1], others[-1], to_seed, i / (frames - 1),
        )
        for seed in seeds
        for i in range(frames)
    ]  # fmt: skip


def read_prompts(prompts: str, file: str) -> list[str]:
    """The prompts of a flag, separated by semicolons, or of a file.

    Args:
      prompts: "a red circle; two blue stars".
      file: a .csv with one of COLUMNS, or else a text file with a prompt a line.

    Raises:
      UserError: none or both are given, the file cannot be read, or a prompt is empty.
    """
    if bool(prompts) == bool(file):
        raise UserError('give either --prompts="a red circle" or --prompts_file=FILE (see --help)')
    found = prompts.split(";") if prompts else _from_file(Path(file))
    found = [prompt.strip() for prompt in found]
    if not any(found):
        raise UserError(f"{'--prompts' if prompts else f'--prompts_file={file}'} holds no prompt")
    if not all(found):
        where = "--prompts" if prompts else f"--prompts_file={file}"
        raise UserError(f"{where}: prompt {found.index('') + 1} is empty")
    return found


def _from_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"--prompts_file={path} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--prompts_file={path} is not UTF-8 at byte {e.start}") from e
    if path.suffix.lower() != ".csv":
        return [line for line in text.splitlines() if line.strip()]
    rows = csv.DictReader(text.splitlines())
    column = next((c for c in COLUMNS if c in (rows.fieldnames or [])), None)
    if column is None:
        found = ", ".join(rows.fieldnames or []) or "nothing"
        raise UserError(
            f"--prompts_file={path} has the columns {found}; one must be {', '.join(COLUMNS)}"
        )
    return [row[column] or "" for row in rows]


def read_image(flag: str, file: str, size: int) -> np.ndarray:
    """An RGB picture of size x size pixels, uint8 [size, size, 3].

    Raises:
      UserError: it cannot be read, or has another size or mode (alpha, gray, 16 bits).
    """
    return np.asarray(_opened(flag, file, size, "RGB"))


def read_mask(flag: str, file: str, size: int) -> np.ndarray:
    """A black and white picture, bool [size, size, 1]: True (white) where there is to be drawn.

    Raises:
      UserError: as read_image; or it is black all over.
    """
    mask = np.asarray(_opened(flag, file, size, "L", "1").convert("L"))[..., None] > 127
    if not mask.any():
        raise UserError(f"{flag}={file} is black all over; white is where there is to be drawn")
    return mask


def _opened(flag: str, file: str, size: int, *modes: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
    except FileNotFoundError as e:
        raise UserError(f"{flag}={file}: there is no such file") from e
    except OSError as e:
        raise UserError(f"{flag}={file} is no picture that can be read") from e
    if image.mode not in modes or image.size != (size, size):
        width, height = image.size
        raise UserError(
            f"{flag}={file} is {width}x{height} in mode {image.mode}; it must be {size}x{size} in "
            f"mode {' or '.join(modes)}"
        )
    return image
