"""Draws a scene at any resolution, antialiased by drawing it larger and averaging pixels."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageChops, ImageDraw

from data_pipelines.scenes import glyphs
from data_pipelines.scenes.scene import Picture, Thing, Word
from data_pipelines.scenes.shapes import OUTLINES
from data_pipelines.scenes.vocabulary import BACKGROUNDS, COLORS

# Smallest canvas in pixels. On a smaller one, Pillow's errors of half a pixel would show.
MIN_CANVAS = 512

# In radii of the object, so a pattern scales with it.
STRIPE_PERIOD = 0.62
DOT_SPACING = 0.54
DOT_RADIUS = 0.16


def render(scene: Picture, size: int) -> np.ndarray:
    """Draws the scene as uint8 [size, size, 3]; sizes differ only in resolution."""
    oversampling = max(2, MIN_CANVAS // size)
    side = size * oversampling
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    for thing in scene.objects:
        _draw_thing(canvas, thing)
    if scene.word:
        _draw_word(canvas, scene.word)
    return np.asarray(canvas.reduce(oversampling))


def silhouette(shape: str, side: int) -> np.ndarray:
    """Draws a shape that fills a square of `side` pixels: float [side, side], 1 inside."""
    mask = Image.new("L", (4 * side, 4 * side))
    _fill(ImageDraw.Draw(mask), (OUTLINES[shape] + 1) * 2 * side, 255)
    return np.asarray(mask.reduce(4)) / 255


def _fill(pen: ImageDraw.ImageDraw, outline: np.ndarray, color) -> None:
    # Integer coordinates are pixel centers in Pillow, and pixel corners here.
    pen.polygon((outline - 0.5).ravel().tolist(), fill=color)


def _draw_thing(canvas: Image.Image, thing: Thing) -> None:
    tone, second_tone = COLORS[thing.color]
    center, radius = np.array([[thing.x, thing.y]]) * canvas.width, thing.radius * canvas.width
    outline = OUTLINES[thing.shape] * radius + center
    _fill(ImageDraw.Draw(canvas), outline, tone)
    if thing.texture == "plain":
        return
    corner = np.floor(center - radius).astype(int)
    side = int(np.ceil(2 * radius)) + 2
    inside, pattern = Image.new("L", (side, side)), Image.new("L", (side, side))
    _fill(ImageDraw.Draw(inside), outline - corner, 255)
    draw_pattern = {"striped": _stripes, "dotted": _dots}[thing.texture]
    draw_pattern(ImageDraw.Draw(pattern), center - corner, radius)
    canvas.paste(second_tone, tuple(corner[0].tolist()), ImageChops.darker(inside, pattern))


def _stripes(pen: ImageDraw.ImageDraw, center: np.ndarray, radius: float) -> None:
    """Draws diagonal bands x + y = const that cover half of the surface."""
    for k in range(-3, 4):
        low, high = np.sqrt(2) * STRIPE_PERIOD * np.array([k - 0.25, k + 0.25])
        band = np.array([[-2, low + 2], [2, low - 2], [2, high - 2], [-2, high + 2]])
        _fill(pen, band * radius + center, 255)


def _dots(pen: ImageDraw.ImageDraw, center: np.ndarray, radius: float) -> None:
    """Draws dots on a triangular grid."""
    for row in range(-2, 3):
        for column in range(-2, 3):
            x, y = column + row % 2 / 2, row * np.sqrt(3) / 2
            middle = np.array([x, y]) * DOT_SPACING * radius + center[0]
            reach = DOT_RADIUS * radius
            pen.ellipse([*(middle - reach), *(middle + reach)], fill=255)


def _draw_word(canvas: Image.Image, word: Word) -> None:
    tone, pen = COLORS[word.color][0], ImageDraw.Draw(canvas)
    cells = glyphs.cells(word.text)
    cell = word.height / glyphs.ROWS * canvas.width
    left = word.x * canvas.width - cells.shape[1] / 2 * cell
    top = (word.y - word.height / 2) * canvas.width
    for row, column in np.argwhere(cells):
        # Neighboring cells round their shared corners alike, so there is no seam.
        x0, y0 = round(left + column * cell), round(top + row * cell)
        x1, y1 = round(left + (column + 1) * cell) - 1, round(top + (row + 1) * cell) - 1
        pen.rectangle([x0, y0, x1, y1], fill=tone)
