"""What the answers of a study say: tables of rates with intervals, as text, HTML and CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from imagen_jax.common import html
from imagen_jax.evaluation.rating import protocols, statistics
from imagen_jax.evaluation.rating.protocols import ALL, SCORES
from imagen_jax.evaluation.rating.statistics import Estimate, Strengths
from imagen_jax.evaluation.rating.store import Rater, Store

MARGIN = 0.05
NO_PEOPLE = "no people"
TITLES = {
    "quality": "Image quality",
    "alignment": "Image-text alignment",
    "photorealism": "Photorealism",
    "similarity": "Caption similarity",
}
Rating = dict[str, Any]  # of Store.ratings


class Row(NamedTuple):
    """The answers to one question about one category or subset.

    Attributes:
      rates: one per column of the table.
      needed: raters still needed for the margin; inf if that takes more prompts, nan if unknown.
    """

    subset: str
    rates: list[Estimate]
    agreement: float
    prompts: int
    raters: int
    answers: int
    needed: float


class Table(NamedTuple):
    """A question about a pair of models, a model and the reference, or one of these."""

    title: str
    columns: list[str]
    rows: list[Row]


class Rated(NamedTuple):
    """A rater with their controls."""

    rater: Rater
    right: int
    controls: int

    @property
    def kept(self) -> bool:
        """Whether the answers count: with controls, at least protocols.PASSING must be right."""
        return self.controls == 0 or self.right >= protocols.PASSING * self.controls


class Results(NamedTuple):
    """The results of a study.

    Attributes:
      strengths: with more than two models, the Bradley-Terry strengths by question.
    """

    protocol: str
    models: list[str]
    margin: float
    tables: list[Table]
    strengths: dict[str, Strengths]
    raters: list[Rated]


def analyze(store: Store, margin: float = MARGIN) -> Results:
    """Returns the results so far; unfinished raters count with what they have answered."""
    settings, ratings = store.settings(), store.ratings()
    raters = _controls(store.raters(), ratings)
    dropped = {r.rater.id for r in raters if not r.kept}
    if settings["protocol"] == "coco":  # unchecked so far: no control is answered
        dropped |= {r.rater.id for r in raters if not r.controls}
    used = [r for r in ratings if not r["accepted"] and r["rater"] not in dropped]
    models = list(settings["models"])
    groups = _grouped(used, lambda r: (r["question"], *r["owners"]))
    tables = [
        _table(question, owners, groups[question, *owners], margin)
        for question, *owners in sorted(groups, key=lambda key: list(TITLES).index(key[0]))
    ]
    strengths = {}
    if settings["protocol"] == "drawbench" and len(models) > 2:
        for question, group in _grouped(used, lambda r: r["question"]).items():
            if {name for r in group for name in r["owners"]} == set(models):
                strengths[question] = _strengths(group, models)
    return Results(settings["protocol"], models, margin, tables, strengths, raters)


def _controls(raters: Iterable[Rater], ratings: Iterable[Rating]) -> list[Rated]:
    answered: dict[int, list[bool]] = {}
    for r in ratings:
        if r["accepted"]:
            answered.setdefault(r["rater"], []).append(r["answer"] in r["accepted"])
    return [Rated(r, sum(c := answered.get(r.id, [])), len(c)) for r in raters]


def _grouped(ratings: Iterable[Rating], key: Callable[[Rating], Any]) -> dict[Any, list[Rating]]:
    groups: dict[Any, list[Rating]] = {}
    for rating in sorted(ratings, key=lambda r: r["trial"]):
        groups.setdefault(key(rating), []).append(rating)
    return groups


def _table(question: str, owners: list[str], ratings: list[Rating], margin: float) -> Table:
    title = TITLES[question]
    if ratings[0]["kind"] == "pair":
        title += f": {owners[0]} against {owners[1]}"
        columns = [f"prefer {owners[0]}", "indifferent", f"prefer {owners[1]}"]
        subsets = _grouped(ratings, lambda r: r["category"])
        subsets = {} if set(subsets) == {ALL} else subsets
    else:
        column = "more real than the reference" if len(owners) == 2 else "score"
        title, columns = f"{title}: {owners[0]}", [column]
        unpeopled = protocols.without_people(r["prompt"] for r in ratings)
        subsets = {NO_PEOPLE: [r for r in ratings if r["prompt"] in unpeopled]}
    rows = [_row(name, r, margin) for name, r in ({ALL: ratings} | subsets).items() if r]
    return Table(title, columns, rows)


def _row(subset: str, ratings: list[Rating], margin: float) -> Row:
    if ratings[0]["kind"] == "pair":
        values = [[r["answer"] == side for side in ("first", "same", "second")] for r in ratings]
    else:
        values = [[SCORES[r["answer"]]] for r in ratings]
    prompts, raters = ([r[name] for r in ratings] for name in ("prompt", "rater"))
    rates = statistics.means(values, prompts, raters)
    agreement = statistics.alpha(
        [r["trial"] for r in ratings], [SCORES[r["answer"]] for r in ratings]
    )
    needed = [rate.raters_needed(margin) for rate in rates]
    return Row(
        subset, rates, agreement, len(set(prompts)), len(set(raters)), len(ratings),
        math.nan if any(map(math.isnan, needed)) else max(needed),
    )  # fmt: skip


def _strengths(ratings: list[Rating], models: list[str]) -> Strengths:
    first, second = ([models.index(r["owners"][i]) for r in ratings] for i in (0, 1))
    scores = [SCORES[r["answer"]] for r in ratings]
    prompts, raters = ([r[name] for r in ratings] for name in ("prompt", "rater"))
    return statistics.strengths(first, second, scores, prompts, raters)


def _percent(e: Estimate) -> str:
    if math.isnan(e.low):
        return f"{100 * e.value:.0f}%"
    return f"{100 * e.value:.0f}% ({100 * e.low:.0f}-{100 * e.high:.0f}%)"


def _needed(row: Row) -> str:
    if math.isnan(row.needed):
        return "-"
    return "more prompts" if math.isinf(row.needed) else f"{row.needed:.0f}"


def _agreement(row: Row) -> str:
    return "-" if math.isnan(row.agreement) else f"{row.agreement:.2f}"


def _header(table: Table, margin: float) -> list[str]:
    needed = f"raters to go for ±{100 * margin:g}%"
    return ["", *table.columns, "alpha", "prompts", "raters", needed]


def _cells(row: Row) -> list[str]:
    return [_agreement(row), str(row.prompts), str(row.raters), _needed(row)]


def _strength_rows(results: Results, question: str) -> list[list[str]]:
    found = results.strengths[question]
    columns = zip(results.models, found.value, found.low, found.high, strict=True)
    ranked = sorted(columns, key=lambda row: -row[1])
    return [[name, f"{v:+.2f} ({lo:+.2f} to {hi:+.2f})"] for name, v, lo, hi in ranked]


def _progress(results: Results) -> str:
    total = len(results.raters)
    started = sum(r.rater.done > 0 for r in results.raters)
    finished = sum(r.rater.done == r.rater.total for r in results.raters)
    text = f"{started} of {total} raters have started, {finished} have finished."
    if results.protocol == "coco":
        out = sum(not r.kept for r in results.raters)
        text += (
            f" {out} are left out: under {100 * protocols.PASSING:.0f}% of their controls right."
        )
    return text


def to_text(results: Results) -> str:
    """Returns the tables for a terminal."""
    blocks = [_progress(results)]
    for table in results.tables:
        lines = [[r.subset, *map(_percent, r.rates), *_cells(r)] for r in table.rows]
        blocks.append(f"{table.title}\n{_aligned([_header(table, results.margin), *lines])}")
    for question in results.strengths:
        lines = [["", "log-strength"], *_strength_rows(results, question)]
        blocks.append(f"{TITLES[question]}: Bradley-Terry\n{_aligned(lines)}")
    return "\n\n".join(blocks)


def _aligned(lines: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def to_html(results: Results) -> str:
    """Returns the results as one page; its links are relative to results/TOKEN/."""
    parts = [
        html.element("p", _progress(results)),
        '<p><a href="answers.csv">answers.csv</a></p>',
    ]
    for table in results.tables:
        rows = [
            [html.escape(r.subset), *map(_bar, r.rates), *map(html.escape, _cells(r))]
            for r in table.rows
        ]
        parts.append(html.element("h2", table.title))
        parts.append(html.stacking_table(_header(table, results.margin), rows))
    for question in results.strengths:
        parts.append(html.element("h2", f"{TITLES[question]}: Bradley-Terry"))
        parts.append(html.table(["", "log-strength"], _strength_rows(results, question)))
    parts.append(
        html.element(
            "p",
            "Intervals are 95%, clustered by prompt and rater. alpha is Krippendorff's: 1 is full "
            "agreement of the raters, 0 what chance gives.",
        )
    )
    header = ["rater", "answered", "controls right", "counts"]
    rows = [
        [
            str(r.rater.id), f"{r.rater.done} of {r.rater.total}",
            f"{r.right} of {r.controls}" if r.controls else "-", "yes" if r.kept else "no",
        ]
        for r in results.raters
    ]  # fmt: skip
    parts.append(html.details("Raters", html.table(header, rows)))
    return html.page(f"Results: {', '.join(results.models)}", *parts)


def _bar(e: Estimate) -> str:
    bar = "" if math.isnan(e.low) else html.interval(e.value, e.low, e.high)
    return f"{_percent(e)}{bar}"


def to_csv(ratings: Iterable[Rating]) -> str:
    """Returns the answers, one a row, with models by name; `answer` is the preferred one's."""
    file = io.StringIO()
    header = "rater trial kind category prompt left right question answer control seconds time"
    out = csv.writer(file)
    out.writerow(header.split())
    for r in ratings:
        sides = [*r["owners"], ""][:2]
        answer = r["answer"]
        if answer in ("first", "second"):
            answer = r["owners"][("first", "second").index(answer)]
        control = ("right" if r["answer"] in r["accepted"] else "wrong") if r["accepted"] else ""
        shown = sides[::-1] if r["swapped"] and sides[1] else sides
        out.writerow(
            [r["rater"], r["trial"], r["kind"], r["category"], r["prompt"], *shown, r["question"],
             answer, control, f"{r['seconds']:.1f}", r["at"]]
        )  # fmt: skip
    return file.getvalue()
