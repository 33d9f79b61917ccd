"""The vocabulary of scenes: colors, backgrounds, shapes, sizes, textures, words, held-out pairs."""

from __future__ import annotations

import functools

import numpy as np

SPLITS = ("train", "validation", "heldout")

# The main tone of each color, and the second tone of its stripes and dots. A second tone is nearer
# to its own color than to any other, so all parts of a striped red circle are red.
COLORS = {
    "red": ((225, 35, 40), (130, 0, 20)),
    "orange": ((250, 130, 20), (255, 200, 130)),
    "yellow": ((250, 215, 30), (180, 145, 0)),
    "green": ((35, 155, 65), (150, 225, 145)),
    "turquoise": ((25, 200, 195), (165, 245, 240)),
    "blue": ((35, 75, 215), (135, 170, 250)),
    "purple": ((130, 45, 170), (205, 145, 240)),
    "pink": ((250, 130, 185), (180, 40, 110)),
    "brown": ((120, 70, 35), (172, 124, 82)),
    "black": ((15, 15, 18), (92, 92, 98)),
    "white": ((252, 252, 252), (188, 188, 204)),
}

BACKGROUNDS = {
    "white": (250, 250, 250),
    "black": (16, 16, 18),
    "gray": (142, 142, 146),
    "pale blue": (190, 215, 245),
    "pale green": (200, 238, 200),
    "pale yellow": (252, 240, 185),
    "pale pink": (250, 212, 222),
    "navy": (24, 28, 84),
}

SHAPES = (
    "circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring", "moon", "sun",
    "leaf", "raindrop", "cloud", "tree", "arrow",
)  # fmt: skip

# The usual colors of a shape. Every category except Conflicting uses only these.
USUAL_COLORS = {
    "heart": ("red", "pink"),
    "moon": ("yellow", "white"),
    "sun": ("yellow", "orange"),
    "leaf": ("green", "brown"),
    "raindrop": ("blue", "turquoise"),
    "cloud": ("white",),
    "tree": ("green",),
}

# Pairs that occur only in the heldout split, half of them usual, half conflicting.
HELD_OUT = frozenset({
    ("circle", "green"), ("circle", "purple"), ("square", "blue"), ("square", "orange"),
    ("triangle", "red"), ("triangle", "brown"), ("diamond", "yellow"), ("diamond", "turquoise"),
    ("star", "pink"), ("star", "black"), ("cross", "white"), ("ring", "red"), ("arrow", "blue"),
    ("heart", "green"), ("heart", "black"), ("moon", "pink"), ("moon", "red"), ("sun", "blue"),
    ("sun", "purple"), ("leaf", "turquoise"), ("leaf", "yellow"), ("raindrop", "orange"),
    ("cloud", "brown"), ("cloud", "yellow"), ("tree", "white"), ("tree", "purple"),
})  # fmt: skip

# Ranges of the radius (half the longer side of the bounding box, as a share of the image's side) by
# number of objects and size. The gaps between sizes are wide enough to tell sizes apart.
RADII = {
    1: {"small": (0.15, 0.18), "normal": (0.27, 0.33), "large": (0.40, 0.45)},
    2: {"small": (0.11, 0.125), "normal": (0.17, 0.19), "large": (0.24, 0.255)},
    3: {"normal": (0.145, 0.165)},
    4: {"normal": (0.13, 0.145)},
    5: {"normal": (0.12, 0.135)},
}
MAX_OBJECTS = max(RADII)

TEXTURES = ("plain", "striped", "dotted")

# Shapes wide enough for a pattern that is visible at 64 pixels.
TEXTURED_SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cloud")

RELATIONS = ("left of", "right of", "above", "below")

WORDS = (
    "ART", "BEE", "CAR", "CAT", "CUP", "DAY", "DOG", "EGG", "FOX", "HAT", "ICE", "JOY", "KEY",
    "MAP", "OWL", "PIE", "RED", "SEA", "SKY", "SUN", "TEA", "YES", "ZOO", "BIRD", "BLUE", "CAKE",
    "FISH", "GOLD", "HELP", "HOME", "JAZZ", "LOVE", "MILK", "MOON", "OPEN", "PARK", "QUIZ", "RAIN",
    "SALE", "SHIP", "SNOW", "STAR", "STOP", "TAXI", "WAVE", "BREAD", "DREAM", "EARTH", "GREEN",
    "HAPPY", "HELLO", "LIGHT", "MUSIC", "OCEAN", "PEACE", "PIZZA", "RIVER", "SMILE", "TIGER",
    "WORLD", "COFFEE", "DRAGON", "FLOWER", "FRIEND", "GARDEN", "IMAGEN", "ORANGE", "ROCKET",
    "SUMMER", "WINTER",
)  # fmt: skip


def lab(rgb: tuple[int, int, int]) -> np.ndarray:
    """Converts an sRGB color with channels in [0, 255] to CIE Lab; shape [3]."""
    from skimage.color import rgb2lab  # takes long to import, and --help does not need it

    return rgb2lab(np.array(rgb)[None, None] / 255)[0, 0]


# In Lab units; a just noticeable difference is about 2.
MIN_CONTRAST = 42.0


@functools.cache
def contrasting(background: str, textured: bool) -> frozenset[str]:
    """Returns the colors visible on a background, in the main tone or, if textured, in both."""
    return frozenset(
        color
        for color, tones in COLORS.items()
        if all(
            np.linalg.norm(lab(tone) - lab(BACKGROUNDS[background])) > MIN_CONTRAST
            for tone in tones[: 1 + textured]
        )
    )
