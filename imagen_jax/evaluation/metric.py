"""The interface of a metric: a function of images and their examples, and its display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Example = dict[str, Any]  # a record: caption, category, scene, image
Row = dict[str, float]  # the figures of a group; "num" is its number of images
Table = dict[str, Row]  # by group, in the order of display


class Metric(NamedTuple):
    """A metric of samples.

    Attributes:
      title: heading of its table in the report.
      note: one sentence that explains a cell.
      measure: (images uint8 [N, H, W, 3], their N examples) -> Table.
      cell: shows a Row as text.
      protocol: what a figure depends on beyond the samples, as JSON values. It is complete once
        `measure` has run.
    """

    title: str
    note: str
    measure: Callable[[Sequence[np.ndarray], Sequence[Example]], Table]
    cell: Callable[[Row], str]
    protocol: Mapping[str, Any] = {}
