"""A font of 5 by 7 cells for A to Z, so words look the same whatever fonts a machine has.

Every letter touches all four sides of its box, so a word's bounding box gives its grid of cells.
"""

from __future__ import annotations

import numpy as np

ROWS, COLUMNS = 7, 5
PITCH = COLUMNS + 1

# Seven rows per letter. A row is five bits, written as two hexadecimal digits.
_BITS = {
    "A": "0e11111f111111", "B": "1e11111e11111e", "C": "0e11101010110e", "D": "1e11111111111e",
    "E": "1f10101e10101f", "F": "1f10101e101010", "G": "0e11101711110f", "H": "1111111f111111",
    "I": "1f04040404041f", "J": "1f02020202120c", "K": "11121418141211", "L": "1010101010101f",
    "M": "111b1515111111", "N": "11191915131311", "O": "0e11111111110e", "P": "1e11111e101010",
    "Q": "0e11111115120d", "R": "1e11111e141211", "S": "0f10100e01011e", "T": "1f040404040404",
    "U": "1111111111110e", "V": "11111111110a04", "W": "1111111515150a", "X": "11110a040a1111",
    "Y": "11110a04040404", "Z": "1f01020408101f",
}  # fmt: skip

GLYPHS = {
    letter: np.array([[int(bits[2 * r : 2 * r + 2], 16) >> (4 - c) & 1 for c in range(COLUMNS)]
                      for r in range(ROWS)], dtype=bool)
    for letter, bits in _BITS.items()
}  # fmt: skip


def columns(letters: int) -> int:
    """Returns the width in cells of a word with this many letters."""
    return PITCH * letters - 1


def cells(text: str) -> np.ndarray:
    """Returns the cells of a word of capital letters, True for ink: bool [7, 6 * len(text) - 1]."""
    gap = np.zeros((ROWS, 1), dtype=bool)
    return np.concatenate([np.concatenate([GLYPHS[c], gap], 1) for c in text], 1)[:, :-1]
