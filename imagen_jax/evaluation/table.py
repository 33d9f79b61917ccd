"""The metrics by name. A new one takes a module in this folder and a line in `metrics`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation import alignment, judge
from imagen_jax.evaluation.alignment import Check
from imagen_jax.evaluation.metric import Example, Metric
from imagen_jax.evaluation.questions import quoted

# Metrics of this module, and the field of an example that each needs.
NEEDS = {"alignment": "scene", "questions": "questions", "word_accuracy": "quoted"}
LOSSES = "losses"  # not of images, see evaluation.losses


class Sources(NamedTuple):
    """What metrics read.

    Attributes:
      check: reads an image of a scene.
      judge, judge_model: the address of a vision model, and its name.
      answers: file that keeps the judge's answers.
      weights: folder of the weights of image metrics; None for the default.
      reference: images or statistics that image metrics compare with; None for the true images.
    """

    check: Check | None = None
    judge: str = ""
    judge_model: str = ""
    answers: Path = Path("judge_answers.jsonl")
    weights: Path | None = None
    reference: Path | None = None


def names() -> tuple[str, ...]:
    """Returns the names of all metrics."""
    return (*NEEDS, LOSSES, *_image_metrics().NAMES)


def _image_metrics() -> Any:
    from imagen_jax.evaluation import image_metrics  # imports JAX

    return image_metrics


def check_names(wanted: Sequence[str], judge: str) -> None:
    """Raises UserError if there is no such metric, or the judge of "questions" is missing.

    The metrics of this module are checked without importing JAX.
    """
    known = {*NEEDS, LOSSES}
    unknown = [name for name in wanted if name not in known]
    if unknown and (wrong := [name for name in unknown if name not in names()]):
        raise UserError(f"--metrics has {wrong[0]!r}; allowed: {', '.join(names())}")
    if "questions" in wanted and not judge:
        raise UserError(
            "--metrics has questions, which a vision model answers; give its address with "
            "--judge=http://HOST:PORT/v1 and its name with --judge_model"
        )


def metrics(wanted: Sequence[str], sources: Sources) -> dict[str, Metric]:
    """Returns metrics by name, in the order of `wanted`.

    Raises:
      UserError: a metric lacks a package, its weights or its reference.
    """
    own = {
        "alignment": lambda: alignment.metric(sources.check, protocol={"check": "scenes"}),
        "questions": lambda: judge.questions(sources.judge, sources.judge_model, sources.answers),
        "word_accuracy": judge.word_accuracy,
    }
    others = [name for name in wanted if name not in own and name != LOSSES]
    found = {}
    if others:
        found = _image_metrics().metrics(others, sources.weights, sources.reference)
    return {name: own[name]() if name in own else found[name] for name in wanted if name != LOSSES}


def choose(examples: Sequence[Example], judge: str) -> list[str]:
    """Returns the metrics that suit the prompts: alignment for scenes, questions with a judge.

    Raises:
      UserError: there is none.
    """
    chosen = [n for n in ("alignment", "questions") if _suits(n, examples, judge)]
    if not chosen:
        raise UserError(
            "--metrics is needed: the prompts are no scenes, which a program can check, and have "
            "no questions for a --judge (docs/evaluation.md)"
        )
    return chosen


def check_suits(wanted: Sequence[str], examples: Sequence[Example], judge: str) -> None:
    """Raises UserError if the prompts lack what a metric needs."""
    lacks = {
        "alignment": "the prompts are no scenes, whose claims a program can check",
        "questions": "the prompts have no questions; add them with --questions=FILE",
        "word_accuracy": "no prompt quotes a word",
    }
    for name in wanted:
        if name in lacks and not _suits(name, examples, judge):
            raise UserError(f"--metrics has {name}, but {lacks[name]}")


def _suits(name: str, examples: Sequence[Example], judge: str) -> bool:
    if name == "word_accuracy":
        return any(quoted(e["caption"]) for e in examples)
    return (name != "questions" or bool(judge)) and all(e.get(NEEDS[name]) for e in examples)
