"""Which other settings are worth compiling, to find the fastest that fits, or one that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

MICROBATCHES = (1, 2, 4)  # times those of the start
FSDP, TENSOR = (8, 64), (1, 2)
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """What may change without changing what is learned.

    Attributes:
      remat: config.mesh.remat.
      fsdp: config.mesh.fsdp; the data axis takes the devices that are left.
      tensor: config.mesh.tensor.
      microbatches: config.microbatches.
    """

    remat: str
    fsdp: int
    tensor: int
    microbatches: int

    def __str__(self) -> str:
        """As flags."""
        return (
            f"--config.mesh.remat={self.remat} --config.mesh.data=-1 "
            f"--config.mesh.fsdp={self.fsdp} --config.mesh.tensor={self.tensor} "
            f"--config.microbatches={self.microbatches}"
        )


def search(
    start: Setting, remats: Iterable[str], chips: int, attempt: Callable[[Setting], Row]
) -> list[Row]:
    """Attempts one thing after the other, since each takes minutes: the mesh, then what it keeps.

    First `start`, then its policy on every mesh, then all other policies on the fastest of these
    meshes, with more microbatches where these do not fit; and of the fastest of all half as many,
    as long as that is faster.

    Args:
      chips: of one slice.
      attempt: a setting's row; its step_s is None unless it fits.

    Returns:
      The rows in the order of their attempts.
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
    """The predicted step of a row, infinite if it does not fit."""
    return float("inf") if row["step_s"] is None else row["step_s"]


def meshes(chips: int) -> list[tuple[int, int]]:
    """Sizes of fsdp and tensor that are worth attempting on a slice of so many chips."""
    sizes = [(min(f, chips // t), t) for t in TENSOR for f in FSDP if chips % t == 0]
    return [(f, t) for f, t in dict.fromkeys(sizes) if chips % (f * t) == 0]


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
