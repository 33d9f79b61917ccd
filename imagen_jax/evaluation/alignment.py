"""Alignment: whether images show what their captions claim."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from imagen_jax.common.intervals import wilson
from imagen_jax.evaluation.metric import Example, Metric, Row, Table

# (image uint8 [H, W, 3], example) -> (the example's groups, whether each of its claims holds).
Check = Callable[[np.ndarray, Example], tuple[list[str], list[bool]]]


def metric(check: Check) -> Metric:
    """Returns the alignment metric, with `check` to decide whether claims hold."""
    note = (
        "Share of images that satisfy every claim of their caption, with 95% Wilson intervals, and "
        "the share of single claims."
    )
    title = "Do the images match their captions?"
    return Metric(title, note, partial(alignment, check=check), _cell)


def _cell(row: Row) -> str:
    fully, low, high, claims = (100 * row[k] for k in ("fully", "low", "high", "claims"))
    return f"{fully:.0f}% ({low:.0f}-{high:.0f}%), claims {claims:.0f}%"


def alignment(images: Sequence[np.ndarray], examples: Sequence[Example], check: Check) -> Table:
    """Measures the share of the captions' claims that hold, for each group and for "all".

    Args:
      images: uint8 [N, H, W, 3].
      examples: the N records that the images belong to.
      check: the program that reads an image, such as data_pipelines.scenes.check.check_example.

    Returns:
      {group: {"claims": share of satisfied claims, "fully": share of images that satisfy all
      of theirs, "low" and "high": its 95% Wilson interval, "num": number of images}}.
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
