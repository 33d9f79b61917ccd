"""Questions about an image, as TIFA, DSG and GenEval 2 ask them, and whether an answer is right."""

from __future__ import annotations

import re
from typing import NamedTuple

_NUMBERS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
# Text in straight or curly quotation marks. A single mark beside a letter is an apostrophe.
_QUOTED = re.compile(
    r"\"([^\"]+)\"|\u201c([^\u201d]+)\u201d|(?<!\w)['\u2018]([^'\u2019]+)['\u2019](?!\w)"
)


class Question(NamedTuple):
    """A question about an image.

    Attributes:
      text: the question.
      answer: the right answer: "yes", or a word such as "four".
      choices: the answers to choose from; () if the question has none.
      parents: indices of the prompt's questions that must be right for this one to count (DSG).
    """

    text: str
    answer: str = "yes"
    choices: tuple[str, ...] = ()
    parents: tuple[int, ...] = ()

    @property
    def prompt(self) -> str:
        """The question with the answers that are allowed, for a model."""
        if self.choices:
            return f"{self.text} Answer with one of: {', '.join(self.choices)}."
        if self.answer.lower() in ("yes", "no"):
            return f"{self.text} Answer with yes or no."
        return f"{self.text} Answer in one word."

    def is_right(self, reply: str) -> bool:
        """Returns whether a reply has the right answer and none of the others."""
        words, answer = _words(reply), _words(self.answer)
        others = [_words(c) for c in self.choices or ("yes", "no") if _words(c) != answer]
        if not self.choices and answer not in (["yes"], ["no"]):
            return _contains(words, answer)
        # "Yes, there is no doubt" answers yes: a reply that begins with a choice is that choice.
        for choice in sorted((answer, *others), key=len, reverse=True):
            if words[: len(choice)] == choice:
                return choice == answer
        return _contains(words, answer) and not any(_contains(words, o) for o in others)


def _words(text: str) -> list[str]:
    """Returns lower-case words without punctuation; numbers as digits."""
    found = re.findall(r"[\w']+", text.lower())
    return [str(_NUMBERS.index(w)) if w in _NUMBERS else w for w in found]


def _contains(words: list[str], part: list[str]) -> bool:
    return any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


def dsg_question(row: dict[str, str], rows: list[dict[str, str]]) -> Question:
    """Returns the question of a row of DSG's table; dependency "0" means none."""
    index = {r["proposition_id"].strip(): i for i, r in enumerate(rows)}
    parents = [p.strip() for p in row["dependency"].split(",")]
    found = tuple(index[p] for p in parents if p in index)
    return Question(row["question_natural_language"], parents=found)


def tifa_question(row: dict, rows: list[dict]) -> Question:
    """Returns the question of an entry of TIFA."""
    del rows
    return Question(row["question"], str(row["answer"]), tuple(map(str, row.get("choices", ()))))


def quoted(caption: str) -> list[str]:
    """Returns the texts in quotation marks of a caption: 'a sign that says "Go"' has ["Go"]."""
    return [next(filter(None, groups)) for groups in _QUOTED.findall(caption)]
