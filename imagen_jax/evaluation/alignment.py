"""Alignment: whether images show what their captions claim."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from imagen_jax.common.intervals import wilson

Example = dict[str, Any]
# (image uint8 [H, W, 3], example) -> (the example's groups, whether each of its claims holds).
Check = Callable[[np.ndarray, Example], tuple[list[str], list[bool]]]


def alignment(
    images: Sequence[np.ndarray], examples: Sequence[Example], check: Check
) -> dict[str, dict[str, float]]:
    """Measures how many claims of the captions hold, for each group and for "all".

    Args:
      check: the program that reads an image, such as data_pipelines.scenes.check.check_example.

    Returns:
      {group: {"claims": share of satisfied claims, "fully": share of pictures that satisfy all
      of theirs, "low" and "high": its 95% Wilson interval, "num": number of pictures}}.
    """
    verdicts = defaultdict(list)
    for image, example in zip(images, examples, strict=True):
        groups, oks = check(image, example)
        for row in (*groups, "all"):
            verdicts[row].append(oks)
    out = {}
    for row in sorted(verdicts, key=lambda r: (r == "all", r == "one object", r)):
        oks = verdicts[row]
        fully = [all(o) for o in oks]
        low, high = wilson(sum(fully), len(oks))
        out[row] = {
            "claims": float(np.mean([ok for o in oks for ok in o])),
            "fully": float(np.mean(fully)),
            "low": low,
            "high": high,
            "num": len(oks),
        }
    return out
