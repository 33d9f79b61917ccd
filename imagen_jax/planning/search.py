"""Chooses which settings to compile next: to find the fastest one that fits, or any that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

MICROBATCHES = (1, 2, 4)  # multiples of the start's number
FSDP, TENSOR = (8, 64), (1, 2)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """The config keys that may change without changing what the model learns.

    Attributes:
      remat: config.mesh.remat.
      fsdp: config.mesh.fsdp; the data axis takes the remaining devices.
      tensor: config.mesh.tensor.
      microbatches: config.microbatches.
    """

    remat: str
    fsdp: int
    tensor: int
    microbatches: int

    def __str__(self) -> str:
        """Returns the setting as command-line flags."""
        return (
            f"--config.mesh.remat={self.remat} --config.mesh.data=-1 "
            f"--config.mesh.fsdp={self.fsdp} --config.mesh.tensor={self.tensor} "
            f"--config.microbatches={self.microbatches}"
        )


def search(
    start: Setting, remats: Iterable[str], chips: int, attempt: Callable[[Setting], Row]
) -> list[Row]:
    """Searches one key at a time, because each attempt takes minutes: the mesh, then remat.

    1. Attempt `start`.
    2. Attempt the policy of `start` on every mesh.
    3. Attempt every other policy on the fastest of these meshes.
    4. Halve the microbatches of the fastest setting as long as that is faster.

    Steps 2 and 3 raise the number of microbatches while a setting does not fit.

    Args:
      chips: number of chips in one slice.
      attempt: returns a setting's row; its step_s is None unless the setting fits.

    Returns:
      The rows in the order of the attempts.
    """
    rows: dict[Setting, Row] = {}

    def until_it_fits(setting: Setting) -> None:
        for times in MICROBATCHES:
            setting = dataclasses.replace(setting, microbatches=times * start.microbatches)
            if setting not in rows:
                rows[setting] = attempt(setting)
            if rows[setting]["step_s"] is not None:
                return

    def quickest() -> Setting:
        return min(rows, key=lambda setting: seconds(rows[setting]))

    rows[start] = attempt(start)
    for fsdp, tensor in meshes(chips):
        until_it_fits(dataclasses.replace(start, fsdp=fsdp, tensor=tensor))
    fastest = quickest()
    for remat in remats:
        until_it_fits(dataclasses.replace(fastest, remat=remat))
    fastest = quickest()
    while rows[fastest]["step_s"] is not None and fastest.microbatches % 2 == 0:
        half = dataclasses.replace(fastest, microbatches=fastest.microbatches // 2)
        if half not in rows:
            rows[half] = attempt(half)
        if seconds(rows[half]) >= seconds(rows[fastest]):
            break
        fastest = half
    return list(rows.values())


def seconds(row: Row) -> float:
    """Returns a row's predicted seconds per step; infinity if it does not fit."""
    return float("inf") if row["step_s"] is None else row["step_s"]


def meshes(chips: int) -> list[tuple[int, int]]:
    """Returns the (fsdp, tensor) sizes worth attempting on a slice of `chips` chips."""
    sizes = [(min(f, chips // t), t) for t in TENSOR for f in FSDP if chips % t == 0]
    return [(f, t) for f, t in dict.fromkeys(sizes) if chips % (f * t) == 0]


def nearest(tried: Setting, most_fsdp: int, split: bool) -> list[Setting]:
    """Returns settings that need less memory than `tried`, the smallest change first.

    The order: recompute every block; shard the state over `most_fsdp` devices; both; both with 2,
    4 and 8 times the microbatches.

    Args:
      split: whether the state is large enough that sharding it further is worth an attempt.
    """
    fsdp = max(tried.fsdp, most_fsdp) if split else tried.fsdp
    block = dataclasses.replace(tried, remat="block")
    both = dataclasses.replace(block, fsdp=fsdp)
    smaller = [dataclasses.replace(both, microbatches=tried.microbatches * n) for n in (2, 4, 8)]
    settings = [block, dataclasses.replace(tried, fsdp=fsdp), both, *smaller]
    return [s for s in dict.fromkeys(settings) if s != tried]
