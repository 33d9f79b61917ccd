"""Which other settings are worth compiling, to find the fastest that fits, or one that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeVar

MICROBATCHES = (1, 2, 4)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may change without changing what is learned.

    Attributes:
      remat: config.mesh.remat.
      fsdp: config.mesh.fsdp; the data axis takes the devices that are left.
      microbatches: config.microbatches.
    """

    remat: str
    fsdp: int
    microbatches: int

    def __str__(self) -> str:
        """As flags."""
        return (
            f"--config.mesh.remat={self.remat} --config.mesh.data=-1 "
            f"--config.mesh.fsdp={self.fsdp} --config.microbatches={self.microbatches}"
        )


def grid(remats: Iterable[str], most_fsdp: int) -> list[Setting]:
    """The settings of a search: every remat policy, two sizes of fsdp, microbatches as needed."""
    sizes = sorted({min(8, most_fsdp), most_fsdp})
    return [Setting(r, f, m) for r in remats for f in sizes for m in MICROBATCHES]


def first_fits(
    settings: Iterable[Setting], attempt: Callable[[Setting], tuple[bool, T]]
) -> list[T]:
    """Attempts settings in order; more microbatches only where fewer did not fit.

    They cost time and save memory, nothing else, and each attempt costs minutes.

    Args:
      attempt: whether the setting fits, and what else came of it.
    """
    done, results = set(), []
    for setting in settings:
        if (setting.remat, setting.fsdp) not in done:
            fits, result = attempt(setting)
            results.append(result)
            if fits:
                done.add((setting.remat, setting.fsdp))
    return results


def nearest(tried: Setting, most_fsdp: int, split: bool) -> list[Setting]:
    """Settings that need less memory than one that does not fit, from the least to the most change.

    First recompute every block, then split the state over all devices that help, both, then smaller
    parts of the batch at a time.

    Args:
      split: whether the state is so large that splitting it is worth an attempt.
    """
    fsdp = max(tried.fsdp, most_fsdp) if split else tried.fsdp
    block = dataclasses.replace(tried, remat="block")
    both = dataclasses.replace(block, fsdp=fsdp)
    smaller = [dataclasses.replace(both, microbatches=tried.microbatches * n) for n in (2, 4, 8)]
    settings = [block, dataclasses.replace(tried, fsdp=fsdp), both, *smaller]
    return [s for s in dict.fromkeys(settings) if s != tried]
