"""Prompts: read from flags and files, and combined with seeds into requests."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from imagen_jax.common.errors import UserError
from imagen_jax.pipeline.settings import SettingError, Settings, as_list

COLUMNS = ("prompt", "caption", "text")


@dataclasses.dataclass(frozen=True)
class Request:
    """One sample: its prompts and its seed.

    Attributes:
      sr_prompt: prompt of the super-resolution stages, usually the same as prompt.
      to_prompt, to_sr_prompt, to_seed: the end of an interpolation; "" or None without one.
      fraction: position of this sample in the interpolation, 0 to 1.
    """

    prompt: str
    seed: int
    sr_prompt: str
    negative_prompt: str = ""
    to_prompt: str = ""
    to_sr_prompt: str = ""
    to_seed: int | None = None
    fraction: float = 0.0

    def texts(self, sr: bool) -> tuple[str, str, str]:
        """Returns the start, end and negative prompts of a base or super-resolution (sr) stage."""
        start, end = (self.sr_prompt, self.to_sr_prompt) if sr else (self.prompt, self.to_prompt)
        return start, end, self.negative_prompt


def make_requests(prompts: str | Sequence[str], settings: Settings) -> list[Request]:
    """Combines each prompt with each seed or, with settings.frames, interpolates.

    Raises:
      SettingError: a prompt is not a string, or the numbers of prompts and frames do not match.
    """
    prompts = _strings("prompts", prompts)
    sr_prompts = _strings("sr_prompts", settings.sr_prompts) if settings.sr_prompts else prompts
    if len(sr_prompts) not in (1, len(prompts)):
        allowed = f"1 or {len(prompts)}"
        raise SettingError(f"sr_prompts has {len(sr_prompts)} prompts; allowed: {allowed}")
    sr_prompts = sr_prompts * len(prompts) if len(sr_prompts) == 1 else sr_prompts
    [negative] = _strings("negative_prompt", settings.negative_prompt)
    frames, to_seed = settings.frames, settings.to_seed
    if not frames:
        if to_seed is not None:
            raise SettingError(f"to_seed={to_seed} needs frames, the number of images")
        pairs = zip(prompts, sr_prompts, strict=True)
        return [Request(p, seed, sr, negative) for p, sr in pairs for seed in settings.seeds]
    if frames < 2 or len(prompts) > 2 or (len(prompts) == 1 and to_seed is None):
        raise SettingError(
            f"frames={frames} with {len(prompts)} prompt(s); allowed: 2 or more frames between "
            "2 prompts, or with 1 prompt and a to_seed"
        )
    return [
        Request(
            prompts[0], seed, sr_prompts[0], negative,
            prompts[-1], sr_prompts[-1], to_seed, i / (frames - 1),
        )
        for seed in settings.seeds
        for i in range(frames)
    ]  # fmt: skip


def _strings(name: str, value: str | Sequence[str]) -> list[str]:
    strings = as_list(value)
    wrong = [s for s in strings if not isinstance(s, str)]
    if wrong or not strings:
        found = repr(wrong[0]) if wrong else "empty"
        raise SettingError(f"{name} is {found}; it must be a string or a list of strings")
    return [str(s) for s in strings]


def read_prompts(prompts: str, file: str) -> list[str]:
    """Reads the prompts of --prompts or --prompts_file.

    Args:
      prompts: separated by semicolons: "a red circle; two blue stars".
      file: a .csv file with one of COLUMNS, or a text file with one prompt per line.

    Raises:
      UserError: none or both are given, the file cannot be read, or a prompt is empty.
    """
    if bool(prompts) == bool(file):
        raise UserError('give either --prompts="a red circle" or --prompts_file=FILE (see --help)')
    flag = "--prompts" if prompts else f"--prompts_file={file}"
    found = prompts.split(";") if prompts else _from_file(Path(file))
    found = [prompt.strip() for prompt in found]
    if not any(found):
        raise UserError(f"{flag} holds no prompt")
    if not all(found):
        raise UserError(f"{flag}: prompt {found.index('') + 1} is empty")
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
