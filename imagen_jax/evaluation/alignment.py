"""Alignment: whether images show what their captions claim."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from imagen_jax.common.intervals import wilson
from imagen_jax.evaluation.metric import Example, Metric, Row, Table

# (image uint8 [H, W, 3], example) -> (the example's groups, whether each of its claims holds).
# Examples without claims are left out.
Check = Callable[[np.ndarray, Example], tuple[list[str], list[bool]]]

TITLE = "Do the images match their captions?"
NOTE = (
    "Share of images that satisfy every claim of their caption, with 95% Wilson intervals, and the "
    "share of single claims."
)


def metric(
    check: Check,
    title: str = TITLE,
    note: str = NOTE,
    protocol: Mapping[str, Any] = {},
    threads: int = 1,
) -> Metric:
    """Returns the alignment metric, with `check` to decide whether claims hold.

    Args:
      protocol: everything that the check depends on.
      threads: calls of the check at once.
    """
    return Metric(title, note, partial(alignment, check=check, threads=threads), cell, protocol)


def cell(row: Row) -> str:
    """Shows the share of images that satisfy all claims, its interval, and the share of claims."""
    fully, low, high, claims = (100 * row[k] for k in ("fully", "low", "high", "claims"))
    return f"{fully:.0f}% ({low:.0f}-{high:.0f}%), claims {claims:.0f}%"


def alignment(
    images: Sequence[np.ndarray], examples: Sequence[Example], check: Check, threads: int = 1
) -> Table:
    """Measures the share of the captions' claims that hold, for each group and for "all".

    Args:
      images: uint8 [N, H, W, 3].
      examples: the N records that the images belong to.
      check: the program that reads an image, such as data_pipelines.scenes.check.check_example.
      threads: calls of the check at once.

    Returns:
      {group: {"fully": share of images that satisfy all claims of their caption, "low" and "high":
      its 95% Wilson interval, "claims": share of satisfied claims, "num": number of images,
      "scores": 1 for each image that satisfies all claims, else 0}}.
    """
    verdicts = defaultdict(list)
    for groups, oks in _checked(images, examples, check, threads):
        for row in (*groups, "all") if oks else ():
            verdicts[row].append(oks)
    out = {}
    for row in sorted(verdicts, key=lambda r: (r == "all", r == "one object", r)):
        oks = verdicts[row]
        fully = [int(all(o)) for o in oks]
        low, high = wilson(sum(fully), len(oks))
        out[row] = {
            "fully": float(np.mean(fully)),
            "low": low,
            "high": high,
            "claims": float(np.mean([ok for o in oks for ok in o])),
            "num": len(oks),
            "scores": fully,
        }
    return out


def _checked(
    images: Sequence[np.ndarray], examples: Sequence[Example], check: Check, threads: int
) -> Iterator[tuple[list[str], list[bool]]]:
    """Yields the verdicts in order; takes a few images at a time, which may be read from disk.

    A check that takes more than a few seconds shows its progress.
    """
    pairs = zip(images, examples, strict=True)
    bar = tqdm(total=len(images), desc="checking", unit="image", delay=3)
    with bar, ThreadPoolExecutor(threads) as pool:
        run = pool.map if threads > 1 else map
        while some := list(itertools.islice(pairs, 4 * threads)):
            for verdict in run(lambda pair: check(*pair), some):
                bar.update()
                yield verdict
