"""Outlines of the shapes: a closed polygon each, in a box of side 2 around the origin, y down."""

from __future__ import annotations

import numpy as np


def _arc(start: float, stop: float, radius: float = 1.0, center=(0.0, 0.0), points: int = 128):
    """Returns points on a circle; angles are in turns, clockwise from the right."""
    angle = 2 * np.pi * np.linspace(start, stop, points)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius + np.array([center])


def _spiked(spikes: int, inner: float) -> np.ndarray:
    angle = np.pi * (np.arange(2 * spikes) / spikes - 0.5)
    radius = np.where(np.arange(2 * spikes) % 2 == 0, 1.0, inner)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]


def _ring() -> np.ndarray:
    # Around the rim, then back around the hole; the seam between them has no width.
    return np.concatenate([_arc(0, 1), _arc(1, 0, radius=0.55)])


def _moon() -> np.ndarray:
    return np.concatenate(
        [_arc(0.125, 0.875), _arc(0.81, 0.19, radius=0.7628, center=(0.425, 0.0))]
    )


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 128)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


def _leaf() -> np.ndarray:
    blade = np.concatenate([_arc(0.125, 0.375, 1.414, (0, -1)), _arc(0.625, 0.875, 1.414, (0, 1))])
    stem = np.array([[0.93, -0.06], [1.5, -0.06], [1.5, 0.06], [0.93, 0.06]])
    outline = np.concatenate([stem, blade])
    turn = np.sqrt(0.5) * np.array([[1.0, 1.0], [-1.0, 1.0]])
    return outline @ turn


def _raindrop() -> np.ndarray:
    # The two straight sides of the tip are tangents to the round part.
    return np.concatenate([_arc(-0.08, 0.58), np.array([[0.0, -2.07]])])


def _cloud() -> np.ndarray:
    # The outline in each direction is the farthest of several circles around the origin.
    circles = ((-0.52, 0.06, 0.56), (-0.12, -0.36, 0.62), (0.42, -0.1, 0.6), (0.3, 0.1, 0.5))
    angle = np.linspace(0, 2 * np.pi, 256, endpoint=False)
    ray = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    reach = [
        ray @ [x, y] + np.sqrt((ray @ [x, y]) ** 2 + r**2 - x**2 - y**2) for x, y, r in circles
    ]
    outline = ray * np.max(reach, axis=0)[:, None]
    return np.minimum(outline, np.array([[np.inf, 0.42]]))


def _mirrored(right: list[tuple[float, float]]) -> np.ndarray:
    side = np.array(right)
    return np.concatenate([side, side[::-1] * np.array([[-1.0, 1.0]])])


def _fitted(outline: np.ndarray) -> np.ndarray:
    """Centers an outline and scales the longer side of its bounding box to 2."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    return (outline - ((low + high) / 2)[None]) * 2 / (high - low).max()


_TREE = [(0.0, -1.0), (0.5, -0.35), (0.28, -0.35), (0.66, 0.15), (0.4, 0.15), (0.82, 0.68),
         (0.15, 0.68), (0.15, 1.0)]  # fmt: skip
_CROSS = [(0.33, -1), (0.33, -0.33), (1, -0.33), (1, 0.33), (0.33, 0.33), (0.33, 1)]
_ARROW = [(-1, -0.27), (0.05, -0.27), (0.05, -0.8), (1, 0), (0.05, 0.8), (0.05, 0.27), (-1, 0.27)]

OUTLINES = {
    name: _fitted(np.asarray(outline, dtype=float))
    for name, outline in {
        "circle": _arc(0, 1),
        "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
        "triangle": [(0, -1), (1, 0.75), (-1, 0.75)],
        "diamond": [(0, -1), (0.7, 0), (0, 1), (-0.7, 0)],
        "star": _spiked(5, 0.42),
        "heart": _heart(),
        "cross": _mirrored(_CROSS),
        "ring": _ring(),
        "moon": _moon(),
        "sun": _spiked(8, 0.58),
        "leaf": _leaf(),
        "raindrop": _raindrop(),
        "cloud": _cloud(),
        "tree": _mirrored(_TREE),
        "arrow": _ARROW,
    }.items()
}
