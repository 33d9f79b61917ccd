"""The human evaluations of the Imagen paper (arXiv:2205.11487, section 3 and appendix C).

    drawbench   pairs of models: two sets of eight samples of a prompt, two questions, three answers
    coco        each model against the reference images: which is more photorealistic, and does the
                caption describe the image

Raters get whole batches of trials: in drawbench the prompts of one category, in coco 50 images.
Trials of coco are interleaved with controls, whose right answer is known.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation.rating.folders import Folder

REFERENCE = "reference"
ALL = "all prompts"

SAMPLES = 8  # of a model and a prompt, side by side
PAIRS = 200  # image-caption pairs of coco
BATCH = 50  # images of coco that a rater judges
CONTROL_EVERY = 5  # trials of coco per control
PASSING = 0.8  # share of the controls that a rater must get right

PEOPLE = {
    *("man", "men", "woman", "women", "person", "people", "child", "adult", "adults", "boy"),
    *("boys", "girl", "girls", "guy", "lady", "ladies", "someone", "toddler", "player"),
    *("workers", "spectators"),
}


class Question(NamedTuple):
    """A question with its answers: value that the browser sends -> label."""

    name: str
    text: str
    answers: dict[str, str]


_PREFER = {"left": "I prefer set A", "same": "I am indifferent", "right": "I prefer set B"}
# Kind of trial -> its questions.
QUESTIONS = {
    "pair": (
        Question("quality", "Which set of images is of higher quality?", _PREFER),
        Question("alignment", "Which set of images better represents the text caption?", _PREFER),
    ),
    "photorealism": (
        Question(
            "photorealism",
            "Which image is more photorealistic (looks more real)?",
            {"left": "Image A", "right": "Image B"},
        ),
    ),
    "similarity": (
        Question(
            "similarity",
            "Does the caption accurately describe the above image?",
            {"yes": "Yes", "somewhat": "Somewhat", "no": "No"},
        ),
    ),
}
# Raters of each batch in the paper; for coco, the ratings that were left for each image.
RATERS = {"pair": 25, "photorealism": 73, "similarity": 51}
# Answers as they are stored, where the sides have lost their shuffled order.
SCORES = {"first": 1.0, "same": 0.5, "second": 0.0, "yes": 1.0, "somewhat": 0.5, "no": 0.0}


class Picture(NamedTuple):
    """A picture to show: cropped to a square of `size` pixels if that is set, maybe scrambled."""

    path: Path
    size: int = 0
    scrambled: bool = False


class Trial(NamedTuple):
    """What a rater sees at once.

    Attributes:
      kind: a key of QUESTIONS.
      batch: number of its batch.
      owners: whose pictures each side shows: models or REFERENCE.
      sides: the pictures of each side: two, or one with "similarity".
      accepted: the right answers of a control; empty if the trial is none.
    """

    kind: str
    batch: int
    category: str
    prompt: str
    owners: tuple[str, ...]
    sides: tuple[tuple[Picture, ...], ...]
    accepted: tuple[str, ...] = ()


def drawbench(
    models: Mapping[str, Folder],
    categories: Mapping[str, Sequence[str]],
    samples: int,
    rng: random.Random,
) -> list[Trial]:
    """Plans the comparison of every pair of models, with a batch per pair and category.

    Args:
      models: name -> folder; all have the same prompts.
      categories: prompt -> categories; prompts without one are an error. Empty: no categories.
      samples: pictures a side.

    Raises:
      UserError: a prompt has too few pictures or no category, or a category has no prompt.
    """
    if len(models) < 2:
        raise UserError("--protocol=drawbench compares two models or more; add --b=FOLDER")
    first = next(iter(models.values()))
    by_category = _by_category(first, categories)
    shown = {
        (name, prompt): _drawn(folder, prompt, samples, rng)
        for name, folder in models.items()
        for prompt in first.pictures
    }
    batches = itertools.product(itertools.combinations(models, 2), by_category.items())
    return [
        Trial("pair", batch, category, prompt, pair, tuple(shown[name, prompt] for name in pair))
        for batch, (pair, (category, prompts)) in enumerate(batches)
        for prompt in prompts
    ]


def _by_category(folder: Folder, categories: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    if not categories:
        return {ALL: list(folder.pictures)}
    found = {c: [] for named in categories.values() for c in named}
    for prompt in folder.pictures:
        if prompt not in categories:
            raise UserError(f"{folder.flag}: no category is given for the prompt {prompt[:60]!r}")
        for category in categories[prompt]:
            found[category].append(prompt)
    if empty := [c for c, prompts in found.items() if not prompts]:
        raise UserError(f"{folder.flag} has no prompt of the category {empty[0]!r}")
    return found


def _drawn(folder: Folder, prompt: str, samples: int, rng: random.Random) -> tuple[Picture, ...]:
    files = folder.pictures[prompt]
    if len(files) < samples:
        raise UserError(
            f"{folder.flag} has {len(files)} samples of {prompt[:60]!r}; --samples is {samples}. "
            f"Sample with --num={samples} or lower --samples"
        )
    return tuple(Picture(file) for file in rng.sample(files, samples))


def coco(
    models: Mapping[str, Folder],
    references: Folder,
    sizes: Mapping[str, int],
    pairs: int,
    rng: random.Random,
) -> list[Trial]:
    """Plans photorealism against the references and caption similarity, with controls.

    A rater sees no caption twice in one batch, except in controls.

    Args:
      models: name -> folder; all have the same prompts. The first sample of a prompt is shown.
      references: real images with the same captions, maybe with more.
      sizes: name -> side of its pictures, to which references are resized.
      pairs: most captions, drawn at random.

    Raises:
      UserError: a caption has no reference, or there are too few for controls.
    """
    first = next(iter(models.values()))
    if missing := first.pictures.keys() - references.pictures.keys():
        raise UserError(
            f"{references.flag} has no image for {len(missing)} prompts of {first.flag}, such as "
            f"{min(missing)[:60]!r}"
        )
    captions = sorted(first.pictures)
    captions = rng.sample(captions, min(pairs, len(captions)))
    count = -(-len(captions) // BATCH)
    chunks = [captions[i::count] for i in range(count)]
    planner = _Coco(models, references, sizes, rng)
    plans = [
        (planner.realism, planner.realism_control, list(models)),
        (planner.similarity, planner.similarity_control, [*models, REFERENCE]),
    ]
    trials: list[Trial] = []
    batch = 0
    for trial, control, owners in plans:
        for chunk, shift in itertools.product(chunks, range(len(owners))):
            for i, caption in enumerate(chunk):
                trials.append(trial(batch, caption, owners[(i + shift) % len(owners)]))
            spare = [c for c in references.pictures if c not in set(chunk)] or chunk
            number = min(len(spare), max(2, len(chunk) // CONTROL_EVERY))
            for i, caption in enumerate(rng.sample(spare, number)):
                trials.append(control(batch, caption, i))
            batch += 1
    return trials


class _Coco:
    """Makes the trials of coco."""

    def __init__(
        self,
        models: Mapping[str, Folder],
        references: Folder,
        sizes: Mapping[str, int],
        rng: random.Random,
    ):
        self.models, self.references, self.sizes, self.rng = models, references, sizes, rng
        self.largest = max(sizes.values())

    def _real(self, caption: str, size: int, scrambled: bool = False) -> tuple[Picture]:
        return (Picture(self.references.pictures[caption][0], size, scrambled),)

    def realism(self, batch: int, caption: str, owner: str) -> Trial:
        shown = (Picture(self.models[owner].pictures[caption][0]),)
        sides = (shown, self._real(caption, self.sizes[owner]))
        return Trial("photorealism", batch, ALL, caption, (owner, REFERENCE), sides)

    def realism_control(self, batch: int, caption: str, i: int) -> Trial:
        """A real image against the same in shuffled tiles."""
        sides = (
            self._real(caption, self.largest),
            self._real(caption, self.largest, scrambled=True),
        )
        owners = (REFERENCE, "scrambled")
        return Trial("photorealism", batch, ALL, caption, owners, sides, ("first",))

    def similarity(self, batch: int, caption: str, owner: str) -> Trial:
        if owner == REFERENCE:
            shown = self._real(caption, self.largest)
        else:
            shown = (Picture(self.models[owner].pictures[caption][0]),)
        return Trial("similarity", batch, ALL, caption, (owner,), (shown,))

    def similarity_control(self, batch: int, caption: str, i: int) -> Trial:
        """A real image, by turns with its own caption and with that of an unlike image."""
        shown = (self._real(caption, self.largest),)
        if i % 2 == 0:
            accepted = ("yes", "somewhat")
            return Trial("similarity", batch, ALL, caption, (REFERENCE,), shown, accepted)
        unlike = [c for c in self.references.pictures if not words(c) & words(caption)]
        if not unlike:
            raise UserError(
                f"{self.references.flag} has no two captions without a word in common, which "
                "controls need; add references"
            )
        other = self.rng.choice(unlike)
        return Trial("similarity", batch, ALL, other, (REFERENCE,), shown, ("no",))


def words(caption: str) -> set[str]:
    """Returns the words of a caption that have a meaning of their own: of four letters or more."""
    return {w for w in re.findall(r"[a-z]+", caption.lower()) if len(w) > 3}


def without_people(captions: Iterable[str]) -> set[str]:
    """Returns the captions that name no people, by the list of words below the paper's table 2."""
    return {c for c in captions if not PEOPLE & set(re.findall(r"[a-z]+", c.lower()))}
