"""The settings of one call of a cascade, and the sampler configs that follow from them."""

from __future__ import annotations

import dataclasses
import numbers
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from imagen_jax.common.errors import UserError
from imagen_jax.config import Config
from imagen_jax.diffusion.sampler import SamplerConfig

ImageLike = str | os.PathLike | Image.Image | np.ndarray
PerStage = Any  # one value, or a sequence of one value per stage

# Settings per stage: name -> key of SamplerConfig, type.
PER_STAGE: dict[str, tuple[str, type]] = {
    "sampler": ("name", str),
    "steps": ("num_steps", int),
    "spacing": ("spacing", str),
    "guidance": ("guidance_weight", float),
    "guidance_rescale": ("guidance_rescale", float),
    "threshold": ("threshold", str),
    "aug_level": ("aug_level", float),
}
# Whole numbers: name -> smallest and largest value. Seeds are uint32.
RANGES = {
    "seed": (0, 2**32 - 1),
    "to_seed": (0, 2**32 - 1),
    "num": (1, 2**32),
    "frames": (0, 2**32),
    "resample": (1, 2**32),
    "batch_size": (1, 2**32),
}


class SettingError(UserError):
    """A wrong setting. The message starts with its name, so the command line prepends `--`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one call. The command line has a flag of the same name for each.

    A setting "per stage" is one value, or a list of one value per stage; None takes the value of
    the stage's config section `sampling`.

    Attributes:
      seed: seed of a prompt's first sample; each further sample adds 1.
      num: number of samples per prompt; None means 1.
      negative_prompt: prompt that guidance steers away from, instead of the null prompt.
      sr_prompts: prompts of the super-resolution stages, one or as many as prompts; None or ""
        repeats the prompts.
      image: image to start from or to enlarge: a file, a PIL image, or an array uint8 [H, W, 3].
      mask: image whose white pixels are repainted (inpainting).
      strength: how much of the image may change, above 0 up to 1.
      resample: with a mask, number of times each step is taken (RePaint); None means 4.
      frames: number of interpolation frames between two prompts or two seeds.
      to_seed: seed at the end of the interpolation.
      batch_size: samples per batch at 64x64 pixels and below; larger images use fewer.
      two_passes: run guidance's two passes one after the other, which halves the memory.
      truncate_prompts: truncate prompts longer than the text encoder's max_tokens.
      sampler: per stage: ddim, ancestral, dpmpp_2m or heun.
      steps: per stage: sampling steps.
      spacing: per stage: t or log_snr, in which the steps are evenly spaced.
      guidance: per stage: guidance weight; 1 turns guidance off.
      guidance_interval: (low, high), the log-SNRs between which guidance acts, in all stages.
      guidance_rescale: per stage: how far to restore the contrast, 0 to 1.
      threshold: per stage: none, static or dynamic.
      aug_level: per stage: noise level of the low-resolution image, 0 to 1.

    Raises:
      SettingError: a whole number is out of range.
    """

    seed: int = 0
    num: int | None = None
    negative_prompt: str = ""
    sr_prompts: str | Sequence[str] | None = None
    image: ImageLike | None = None
    mask: ImageLike | None = None
    strength: float | None = None
    resample: int | None = None
    frames: int = 0
    to_seed: int | None = None
    batch_size: int = 64
    two_passes: bool = False
    truncate_prompts: bool = False
    sampler: PerStage = None
    steps: PerStage = None
    spacing: PerStage = None
    guidance: PerStage = None
    guidance_interval: Sequence[float] | None = None
    guidance_rescale: PerStage = None
    threshold: PerStage = None
    aug_level: PerStage = None

    def __post_init__(self):
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, numbers.Integral) or not low <= value <= high:
                allowed = f"a whole number from {low} to {high}"
                raise SettingError(f"{name} is {value!r}; allowed: {allowed}")
        if self.seeds[-1] > RANGES["seed"][1]:
            last = RANGES["seed"][1]
            raise SettingError(
                f"seed is {self.seed} and num is {self.num}; the last seed is {last}"
            )

    @property
    def seeds(self) -> range:
        """The seeds of each prompt."""
        return range(self.seed, self.seed + (self.num or 1))


def samplers(settings: Settings, configs: Sequence[Config]) -> list[SamplerConfig]:
    """Returns each stage's config section `sampling` with the settings applied.

    Raises:
      SettingError: a value is out of range, or the setting would have no effect on these stages.
    """
    found = [_sampler(settings, c.sampling, i, len(configs)) for i, c in enumerate(configs)]
    _check_used(settings, [bool(c.unet.low_res) for c in configs], found)
    return found


def _sampler(settings: Settings, base: SamplerConfig, index: int, count: int) -> SamplerConfig:
    changes: dict[str, Any] = {"guidance_batched": not settings.two_passes}
    for name, (key, kind) in PER_STAGE.items():
        value = getattr(settings, name)
        if value is None:
            continue
        values = as_list(value)
        if len(values) not in (1, count):
            allowed = f"1, or one per stage ({count})"
            raise SettingError(f"{name} has {len(values)} values; allowed: {allowed}")
        changes[key] = _convert(name, values[index % len(values)], kind)
    if settings.guidance_interval is not None:
        bounds = as_list(settings.guidance_interval)
        changes["guidance_interval"] = tuple(
            _convert("guidance_interval", v, float) for v in bounds
        )
    if settings.mask is not None:
        changes["resample"] = 4 if settings.resample is None else settings.resample
    elif index == 0 and settings.image is not None:
        strength = 1.0 if settings.strength is None else settings.strength
        changes["strength"] = _convert("strength", strength, float)
    try:
        return dataclasses.replace(base, **changes)
    except UserError as e:
        raise _in_terms_of_settings(e) from e


def _in_terms_of_settings(error: UserError) -> UserError:
    """Replaces a config key at the start of a message by the name of the setting."""
    names = {f"config.sampling.{key}": name for name, (key, _) in PER_STAGE.items()}
    names |= {f"config.sampling.{n}": n for n in ("guidance_interval", "strength", "resample")}
    key, space, rest = str(error).partition(" ")
    return SettingError(names[key] + space + rest) if key in names else error


def _convert(name: str, value: Any, kind: type) -> Any:
    try:
        converted = kind(value)
        fits = kind is not int or isinstance(value, str) or converted == value
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise SettingError(f"{name} is {value!r}; it must be of type {kind.__name__}")
    return converted


def as_list(value: Any) -> list[Any]:
    """Returns a list, tuple or array as a list; anything else as a list of one."""
    return list(value) if isinstance(value, list | tuple | np.ndarray) else [value]


def _check_used(settings: Settings, is_sr: Sequence[bool], found: Sequence[SamplerConfig]) -> None:
    """Raises SettingError for a setting that would have no effect."""
    edits = settings.image is not None and not is_sr[0]
    base_first = "and a base model as the first stage"
    guided = any(s.guidance_weight != 1 for s in found), "guidance other than 1"
    table = {
        "mask": (edits, f"an image, {base_first}"),
        "strength": (edits and settings.mask is None, f"an image, no mask, {base_first}"),
        "resample": (settings.mask is not None, "a mask"),
        "to_seed": (not edits, "no image, unless super-resolution enlarges it"),
        "num": (settings.to_seed is None, "no to_seed, which gives one series of frames"),
        "sr_prompts": (len(set(is_sr)) == 2, "a base model and a super-resolution stage"),
        "aug_level": (any(is_sr), "a super-resolution stage"),
        "negative_prompt": guided,
        "guidance_interval": guided,
        "guidance_rescale": guided,
    }
    for name, (used, needs) in table.items():
        value = getattr(settings, name)
        unset = value is None or (isinstance(value, str | list) and not value)
        if not used and not unset:
            raise SettingError(f"{_shown(name, value)} needs {needs}")


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Image.Image | np.ndarray):
        return f"{name} (an image)"
    return f"{name}={','.join(map(str, as_list(value)))}"
