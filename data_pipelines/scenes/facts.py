"""Labels for what a caption states: as a whole, and at each word that refers to one thing.

Text encoders are pre-trained to predict them (see imagen_jax.pretrain_text).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence

from data_pipelines.scenes.phrases import COLOR_WORDS, NOUNS, NUMBERS
from data_pipelines.scenes.scene import Scene
from data_pipelines.scenes.vocabulary import BACKGROUNDS, COLORS, RELATIONS, SHAPES

FACTS = (
    *SHAPES, *COLORS, "small", "large", "striped", "dotted", *map(str, NUMBERS), *RELATIONS,
    *(f"{color} background" for color in BACKGROUNDS),
)  # fmt: skip
_OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))

# The items of a claim's reference, such as {"shape": "circle", "color": "red"}.
Ref = frozenset[tuple[str, str]]


def stated(claims: Sequence[dict]) -> set[str]:
    """Returns the FACTS that the claims of a caption contain."""
    backgrounds = {f"{c['color']} background" for c in claims if c["kind"] == "background"}
    return backgrounds.union(*_by_thing(claims).values())


def mentions(scene: Scene) -> list[tuple[int, int, set[str]]]:
    """Returns (start, end, facts) of each noun and color in the caption that refers to one thing.

    The facts are everything the caption states about that thing, including its side of a relation.
    Misspelled words, and words that could refer to two things, are left out.
    """
    things = _by_thing(scene.claims)
    owners = defaultdict(list)
    for ref in things:
        for key, value in ref:
            for form in _forms(key, value):
                owners[form].append(ref)
    if not owners:
        return []
    longest_first = "|".join(sorted(map(re.escape, owners), key=len, reverse=True))
    found = re.finditer(rf"\b(?:{longest_first})\b(?! background)", scene.caption)
    return [(m.start(), m.end(), things[owners[m[0]][0]]) for m in found if len(owners[m[0]]) == 1]


def _forms(key: str, value: str) -> Sequence[str]:
    if key == "color":
        return COLOR_WORDS[value]
    return [form for noun in NOUNS[value] for form in noun] if key == "shape" else ()


def _by_thing(claims: Sequence[dict]) -> dict[Ref, set[str]]:
    things: dict[Ref, set[str]] = defaultdict(set)

    def add(ref: dict, *facts: str) -> None:
        attributes = {v for k, v in ref.items() if k != "word"}
        things[frozenset(ref.items())] |= attributes.union(facts)

    for claim in claims:
        kind = claim["kind"]
        if kind == "relation":
            add(claim["a"], claim["relation"])
            add(claim["b"], _OPPOSITE[claim["relation"]])
        elif kind == "word":
            add({key: claim[key] for key in ("word", "color") if key in claim})
        elif kind != "background":
            add(
                claim["object"],
                *(str(claim[k]) for k in ("count", "size", "texture") if k in claim),
            )
    return things
