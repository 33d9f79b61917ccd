"""The interface of a metric: a function of images and their examples, and its display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Example = dict[str, Any]  # a prompt: id, caption, category; where known scene, image, questions
# The figures of a group. The first is the metric's value; "low" and "high" are its 95% interval and
# "num" is the number of images. "scores" has the value of each image, if single images have one:
# two evaluations with the same prompts and seeds are then compared in pairs.
Row = dict[str, Any]
Table = dict[str, Row]  # by group, in the order of display; "all" is all images


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


def value_of(row: Row) -> tuple[str, float]:
    """Returns the name and the value of a row's main figure, the first."""
    return next(iter(row.items()))


def total(table: Table) -> Row:
    """Returns the figures of all images."""
    return table["all"] if "all" in table else list(table.values())[-1]
