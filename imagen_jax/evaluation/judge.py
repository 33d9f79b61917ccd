"""Checks that need no program for the prompts' domain: a vision model, and a reader of text.

Both are an alignment.Check, as the scene checker is: an image and its example give the example's
groups and whether each of its claims holds.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from imagen_jax.common import endpoint
from imagen_jax.common.errors import UserError
from imagen_jax.evaluation import alignment
from imagen_jax.evaluation.metric import Example, Metric
from imagen_jax.evaluation.questions import Question, quoted

THREADS = 8  # questions to an endpoint at once
LEAST_SIDE = 512  # smaller images are enlarged before text is read


class Answers:
    """Answers on disk, a line of JSON each; a line that is cut off is left out.

    Attributes:
      path: the file.
    """

    def __init__(self, path: Path):
        self.path, self._lock = path, threading.Lock()
        self._found: dict[str, str] = {}
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                self._found |= json.loads(line)
            except ValueError:
                continue

    def get(self, key: str) -> str | None:
        """Returns the answer of a key, or None."""
        return self._found.get(key)

    def add(self, key: str, answer: str) -> None:
        """Adds an answer; it is on disk when this returns."""
        with self._lock:
            self._found[key] = answer
            # A line starts with a line break, so it is whole even after one that is cut off.
            with self.path.open("a") as file:
                file.write("\n" + json.dumps({key: answer}))


class Judge:
    """A vision model that answers the questions of each example; an alignment.Check.

    Args:
      address: an endpoint of OpenAI's kind, such as http://localhost:8000/v1.
      model: the endpoint's name of the model.
      answers: keeps the answers, so that no question is asked twice.
    """

    def __init__(self, address: str, model: str, answers: Path):
        self._address, self._model, self._answers = address, model, Answers(answers)

    def __call__(self, image: np.ndarray, example: Example) -> tuple[list[str], list[bool]]:
        """Asks the questions in order; one whose parents were wrong counts as wrong, unasked."""
        data = endpoint.encode(Image.fromarray(image), "png")
        oks: list[bool] = []
        for question in example.get("questions", ()):
            known = [oks[p] for p in question.parents if p < len(oks)]
            oks.append(all(known) and question.is_right(self._answer(data, question)))
        return [example["category"]] if example["category"] else [], oks

    def _answer(self, data: bytes, question: Question) -> str:
        parts = (self._model.encode(), question.prompt.encode(), data)
        key = hashlib.sha256(b"\0".join(parts)).hexdigest()
        if (found := self._answers.get(key)) is None:
            found = endpoint.ask(
                self._address,
                self._model,
                question.prompt,
                data,
                "png",
                flag="judge",
                advice=f"The answers so far are in {self._answers.path}: run the command again",
                max_tokens=32,
            )
            self._answers.add(key, found)
        return found


def questions(address: str, model: str, answers: Path) -> Metric:
    """Returns the metric of a judge: whether its answers to the prompts' questions are right."""
    note = (
        "Share of images for which the judge gives the right answer to every question of the "
        "prompt, with 95% Wilson intervals, and the share of right answers. A question whose "
        "premise is wrong counts as wrong (DSG)."
    )
    title = f"What does the judge see? ({model})"
    check, protocol = Judge(address, model, answers), {"judge": model, "temperature": 0}
    return alignment.metric(check, title, note, protocol, THREADS)


def word_accuracy() -> Metric:
    """Returns the metric of quoted words: whether text recognition finds them in the image.

    Raises:
      UserError: rapidocr is not installed.
    """
    try:
        import onnxruntime
        import rapidocr
    except ImportError as e:
        raise UserError(
            f"--metrics has word_accuracy, which needs {e.name}: pip install -e '.[ocr]'"
        ) from e
    import importlib.metadata

    # At level "critical" it does not log each image without text.
    engine = rapidocr.RapidOCR(params={"Global.log_level": "critical"})
    protocol = {
        "rapidocr": importlib.metadata.version("rapidocr"),
        "onnxruntime": onnxruntime.__version__,
        "resize": f"images below {LEAST_SIDE} pixels are enlarged to it, bicubic",
    }
    note = (
        "Share of images in which text recognition reads every word that the prompt quotes, with "
        "95% Wilson intervals, and the share of words. Prompts that quote nothing are left out."
    )
    return alignment.metric(_reads_words(engine), "Are quoted words there?", note, protocol)


def _reads_words(engine: Any) -> alignment.Check:
    def check(image: np.ndarray, example: Example) -> tuple[list[str], list[bool]]:
        wanted = [word for text in quoted(example["caption"]) for word in _letters(text)]
        if not wanted:
            return [], []
        shown = Image.fromarray(image)
        if min(shown.size) < LEAST_SIDE:
            scale = LEAST_SIDE / min(shown.size)
            sides = tuple(round(side * scale) for side in shown.size)
            shown = shown.resize(sides, Image.Resampling.BICUBIC)
        read = _letters(" ".join(engine(np.asarray(shown)).txts or ()))
        groups = [example["category"]] if example["category"] else []
        return groups, [word in read for word in wanted]

    return check


def _letters(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.casefold())
