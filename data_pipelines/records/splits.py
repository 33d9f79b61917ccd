"""Which records are held out: a rule that hardly changes when records are added."""

from __future__ import annotations

import hashlib
from typing import Any

GRID = 16  # images in a sample grid, the default of config.num_samples


def rank(seed: int, name: Any) -> bytes:
    """Returns the hash by which candidates are held out, the lowest first."""
    return hashlib.sha256(ascii((seed, name)).encode()).digest()


def wanted(num: int, fraction: float) -> int:
    """Returns how many of `num` candidates to hold out if enough are usable; 0 for no fraction."""
    return max(round(num * fraction), GRID) if fraction else 0


def too_few(held_out: int, num: int) -> str:
    """Returns the warning that fewer than GRID are held out."""
    return (
        f"holding out only {held_out} of {num} examples: a grid of {GRID} samples takes "
        f"{2 * GRID} usable examples"
    )
