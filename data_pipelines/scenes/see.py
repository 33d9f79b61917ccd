"""Reads an image's background, objects and word from its pixels."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from PIL import Image
from skimage.color import rgb2lab
from skimage.measure import label, regionprops
from skimage.morphology import erosion

from data_pipelines.scenes import draw, glyphs
from data_pipelines.scenes.scene import Picture, Thing, Word
from data_pipelines.scenes.vocabulary import BACKGROUNDS, COLORS, RADII, lab

# Side in pixels to which every image is resized before it is read.
WORKING_SIZE = 128
# In Lab units: about half the lowest contrast between an object and its background.
FIGURE_CONTRAST = 20.0
# Regions smaller than this share of the image are not objects.
MIN_AREA = 0.002
TEMPLATE_SIZE = 28
MIN_LIKENESS = 0.6
MIN_SECOND_TONE, MAX_SECOND_TONE = 0.18, 0.75
STRIPE_REGULARITY = 0.5
MIN_LETTER_LIKENESS = 0.65
UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class _Blob:
    """A connected region: pixel bounds (top, left, bottom, right) and a mask within them."""

    bounds: tuple[int, int, int, int]
    mask: np.ndarray

    @property
    def height(self) -> int:
        return self.bounds[2] - self.bounds[0]

    @property
    def window(self) -> tuple[slice, slice]:
        top, left, bottom, right = self.bounds
        return slice(top, bottom), slice(left, right)


def see(image: np.ndarray) -> Picture:
    """Finds the background, objects and word of an image.

    Args:
      image: uint8 [S, S, 3] with S >= 32.

    Returns:
      Its contents. A shape unlike all of SHAPES has the name "unknown".
    """
    pixels = Image.fromarray(image).resize((WORKING_SIZE,) * 2, Image.Resampling.BICUBIC)
    lab_hwc = rgb2lab(np.asarray(pixels))
    ground = np.median(lab_hwc[_frame()], axis=0)
    contrast = np.linalg.norm(lab_hwc - ground[None, None], axis=-1)
    regions = regionprops(label(contrast > FIGURE_CONTRAST, connectivity=2))
    blobs = [_Blob(region.bbox, region.image) for region in regions]
    word, letters = _find_word(lab_hwc, contrast, blobs)
    figures = [
        blob
        for blob in blobs
        if blob not in letters and blob.mask.sum() >= MIN_AREA * WORKING_SIZE**2
    ]
    blur = max(1, WORKING_SIZE // (2 * len(image)))
    objects = tuple(
        _recognize(lab_hwc, contrast, blob, len(figures) + bool(word), blur) for blob in figures
    )
    return Picture(_nearest(ground, _background_table()), objects, word)


@functools.cache
def _frame() -> np.ndarray:
    """Masks the outer two pixels on every side, which no object covers: bool [128, 128]."""
    frame = np.ones((WORKING_SIZE,) * 2, dtype=bool)
    frame[2:-2, 2:-2] = False
    return frame


@functools.cache
def _background_table() -> tuple[list[str], np.ndarray]:
    return list(BACKGROUNDS), np.array([lab(rgb) for rgb in BACKGROUNDS.values()])


@functools.cache
def _tone_table() -> np.ndarray:
    """Returns the tones of all colors in Lab: [colors, 2, 3]."""
    return np.array([[lab(tone) for tone in tones] for tones in COLORS.values()])


@functools.cache
def _templates() -> tuple[list[str], np.ndarray]:
    names = list(draw.OUTLINES)
    masks = [draw.silhouette(name, WORKING_SIZE) > 0.5 for name in names]
    return names, np.array([_normalized(mask[_box(mask)]) for mask in masks])


def _nearest(color: np.ndarray, table: tuple[list[str], np.ndarray]) -> str:
    names, colors = table
    return names[int(np.argmin(np.linalg.norm(colors - color[None], axis=1)))]


def _box(mask: np.ndarray) -> tuple[slice, slice]:
    """Returns the bounding box of a mask's true pixels, or all of it if there are none."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return slice(0, mask.shape[0]), slice(0, mask.shape[1])
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def _normalized(mask: np.ndarray) -> np.ndarray:
    """Scales a mask that fills its bounds, and centers it in a square of TEMPLATE_SIZE."""
    height, width = mask.shape
    square = np.zeros((max(height, width),) * 2, np.uint8)
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = 255 * mask
    small = Image.fromarray(square).resize((TEMPLATE_SIZE,) * 2, Image.Resampling.BOX)
    return np.asarray(small) / 255


def _recognize(
    lab_hwc: np.ndarray, contrast: np.ndarray, blob: _Blob, things: int, blur: int
) -> Thing:
    """Describes one of `things` objects in an image whose edges are `blur` pixels wide."""
    inner = _inner(blob.mask, blur)
    color, second_share, second = _read_color(lab_hwc[blob.window], inner)
    texture = "plain"
    if MIN_SECOND_TONE < second_share < MAX_SECOND_TONE:
        texture = "striped" if _stripedness(second, inner) > STRIPE_REGULARITY else "dotted"
    # The edge of a blurred object is where the contrast falls to half of that inside.
    level = np.percentile(contrast[blob.window][inner], 50 if texture == "plain" else 5) / 2
    mask = blob.mask & (contrast[blob.window] > max(level, FIGURE_CONTRAST))
    rows, columns = box = _box(mask)
    radius = max(rows.stop - rows.start, columns.stop - columns.start) / 2 / WORKING_SIZE
    y = (blob.bounds[0] + (rows.start + rows.stop) / 2) / WORKING_SIZE
    x = (blob.bounds[1] + (columns.start + columns.stop) / 2) / WORKING_SIZE
    shape = _name_shape(mask[box])
    return Thing(shape, color, _name_size(radius, things), texture, x, y, radius)


def _inner(mask: np.ndarray, blur: int) -> np.ndarray:
    """Removes the blurred edge of a mask, unless little else remains."""
    inner = erosion(np.pad(mask, 1), np.ones((2 * blur + 1,) * 2, bool))[1:-1, 1:-1]
    return inner if inner.sum() > 0.2 * mask.sum() else mask


def _read_color(lab_hwc: np.ndarray, inner: np.ndarray) -> tuple[str, float, np.ndarray]:
    """Returns a color's name, the share of its second tone, and a mask of it (bool [H, W])."""
    distance = np.linalg.norm(lab_hwc[:, :, None, None] - _tone_table()[None, None], axis=-1)
    votes = np.argmin(distance.min(axis=-1)[inner], axis=-1)
    winner = int(np.argmax(np.bincount(votes, minlength=len(COLORS))))
    second = (distance[:, :, winner, 1] < distance[:, :, winner, 0]) & inner
    return list(COLORS)[winner], second.sum() / inner.sum(), second


def _name_size(radius: float, things: int) -> str:
    """Returns the size with the nearest range of radii, in an image of `things` things."""
    ranges = RADII[min(max(things, 1), 2)]
    return min(ranges, key=lambda size: max(ranges[size][0] - radius, radius - ranges[size][1]))


def _name_shape(mask: np.ndarray) -> str:
    names, templates = _templates()
    seen = _normalized(mask)[None]
    likeness = np.minimum(templates, seen).sum((1, 2)) / np.maximum(templates, seen).sum((1, 2))
    best = int(np.argmax(likeness))
    return names[best] if likeness[best] > MIN_LIKENESS else UNKNOWN


def _stripedness(second: np.ndarray, inner: np.ndarray) -> float:
    """Returns the share of a pattern's variance, 0 to 1, that position on one axis explains."""
    y, x = np.nonzero(inner)
    value = second[inner].astype(float)
    explained = []
    for position in (x, y, (x + y) // 2, (x - y + inner.shape[0]) // 2):
        count = np.maximum(np.bincount(position), 1)
        mean = np.bincount(position, value) / count
        explained.append(np.var(mean[position]))
    return float(max(explained) / max(np.var(value), 1e-9))


def _find_word(
    lab_hwc: np.ndarray, contrast: np.ndarray, blobs: list[_Blob]
) -> tuple[Word | None, list[_Blob]]:
    """Returns the most legible word, and the blobs that are its letters."""
    best, letters, best_clarity = None, [], MIN_LETTER_LIKENESS
    for row in _rows(blobs):
        top, left = np.min([blob.bounds[:2] for blob in row], axis=0)
        bottom, right = np.max([blob.bounds[2:] for blob in row], axis=0)
        text, clarity = _read_letters(contrast[top:bottom, left:right])
        if clarity > best_clarity:
            ink = contrast[top:bottom, left:right]
            mask = ink >= 0.8 * np.percentile(ink, 90)
            color = _read_color(lab_hwc[top:bottom, left:right], mask)[0]
            x, y = (left + right) / 2 / WORKING_SIZE, (top + bottom) / 2 / WORKING_SIZE
            best = Word(text, color, float(x), float(y), float(bottom - top) / WORKING_SIZE)
            letters, best_clarity = row, clarity
    return best, letters


def _rows(blobs: list[_Blob]) -> list[list[_Blob]]:
    """Groups blobs of similar height on one line, no farther apart than letters."""
    rows: list[list[_Blob]] = []
    for blob in sorted(blobs, key=lambda blob: blob.bounds[1]):
        for row in rows:
            last = row[-1]
            overlap = min(last.bounds[2], blob.bounds[2]) - max(last.bounds[0], blob.bounds[0])
            gap = blob.bounds[1] - last.bounds[3]
            if overlap > 0.7 * max(last.height, blob.height) and gap < 0.4 * blob.height:
                row.append(blob)
                break
        else:
            rows.append([blob])
    return rows


def _read_letters(ink: np.ndarray) -> tuple[str, float]:
    """Reads the text in a window; returns it with its letters' mean correlation with glyphs."""
    ink = np.minimum(ink / max(float(np.percentile(ink, 90)), 1e-6), 1)
    # The edge of a blurred letter is uncertain, so take the clearest of several readings.
    readings = [_read_grid(ink[_box(ink > level)]) for level in (0.4, 0.55, 0.7)]
    return max(readings, key=lambda reading: reading[1])


def _read_grid(ink: np.ndarray) -> tuple[str, float]:
    height, width = ink.shape
    letters = round((width * glyphs.ROWS / height + 1) / glyphs.PITCH)
    if not 3 <= letters <= 6:
        return "", -1.0
    size = glyphs.columns(letters), glyphs.ROWS
    grid = np.asarray(Image.fromarray(ink.astype(np.float32)).resize(size, Image.Resampling.BOX))
    text, clarity = "", 0.0
    for start in range(0, size[0], glyphs.PITCH):
        cells = grid[:, start : start + glyphs.COLUMNS]
        likeness = _glyph_table() @ _standardized(cells)
        text += list(glyphs.GLYPHS)[int(np.argmax(likeness))]
        clarity += float(likeness.max()) / letters
    return text, clarity


@functools.cache
def _glyph_table() -> np.ndarray:
    return np.array([_standardized(glyph.astype(float)) for glyph in glyphs.GLYPHS.values()])


def _standardized(cells: np.ndarray) -> np.ndarray:
    """Flattens cells to zero mean and unit length, so that dot products are correlations."""
    centered = cells.ravel() - cells.mean()
    return centered / max(float(np.linalg.norm(centered)), 1e-9)
