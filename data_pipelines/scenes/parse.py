"""Reads the claims of a typed caption, if the grammar of the scenes could have written it.

Nothing is guessed: a caption with any word or form that the grammar lacks has no claims here, and
neither has a misspelled one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from data_pipelines.scenes.grammar import ON_BACKGROUND, OPENINGS
from data_pipelines.scenes.phrases import (
    COLOR_WORDS,
    NOUNS,
    NUMBERS,
    RELATION_WORDS,
    SIZE_WORDS,
    TEXTURE_TAILS,
    TEXTURE_WORDS,
)
from data_pipelines.scenes.vocabulary import BACKGROUNDS, MAX_OBJECTS, WORDS

Claims = list[dict]


def _meanings(words: dict[str, tuple[str, ...]]) -> dict[str, str]:
    return {word.strip(): meaning for meaning, found in words.items() for word in found if word}


def _any(words: Iterable[str]) -> str:
    return "(?:" + "|".join(sorted(map(re.escape, words), key=len, reverse=True)) + ")"


_SIZES, _COLORS = _meanings(SIZE_WORDS), _meanings(COLOR_WORDS)
_TEXTURES, _TAILS = _meanings(TEXTURE_WORDS), _meanings(TEXTURE_TAILS)
_RELATIONS = _meanings(RELATION_WORDS)
_SHAPES = [
    {pair[plural]: shape for shape, pairs in NOUNS.items() for pair in pairs} for plural in (0, 1)
]
_NUMBERS = {str(n): n for n in NUMBERS} | {word: n for n, word in NUMBERS.items()}

_LISTED = tuple(o.removesuffix("{}") for o in OPENINGS)
_OTHER = (
    "a simple flat illustration of ", "a clean vector drawing showing ", "a minimal poster with ",
    "a picture with ", "there are ", "exactly ",
)  # fmt: skip
_PREFIXES = sorted({*_LISTED, *_OTHER}, key=len, reverse=True)
_NOTHING_ELSE = re.compile(r"(.+?)(?:, with nothing else in the picture,?| and nothing else,?)")
_BACKGROUND = re.compile(
    f"(.+) {_any(o.partition('{}')[0].strip() for o in ON_BACKGROUND)} "
    f"({_any(BACKGROUNDS)}) background"
)


def _noun_phrase(plural: int) -> str:
    """Returns a pattern with the groups size, texture, color, shape, color after "in", and tail."""
    return (
        f"(?:({_any(_SIZES)}) )?(?:({_any(_TEXTURES)}) )?(?:({_any(_COLORS)})(?:-colored)? )?"
        f"({_any(_SHAPES[plural])})\\b(?: in ({_any(_COLORS)})| ({_any(_TAILS)}))?"
    )


_ONE = re.compile(f"an? {_noun_phrase(0)}")
_SEVERAL = re.compile(f"({_any(_NUMBERS)}) (?:{_noun_phrase(1)}|{_noun_phrase(0)})")
_WORD = re.compile(f'"({_any(WORDS)})"')
_IN_COLOR = f"(?: (?:written )?in ({_any(_COLORS)})(?: letters)?)?"
_THE_WORD = re.compile(
    f"(?:the (?:word|text|letters)|text that reads|a sign that says)? ?{_WORD.pattern}"
    f"(?:{_IN_COLOR}| in capital letters)"
)


def claims_of(caption: str) -> tuple[dict, ...] | None:
    """Returns the claims of a caption (see claims.py), or None if it is outside the grammar."""
    text = caption.strip().removesuffix(".")
    text = text[:1].lower() + text[1:]
    end: Claims = []
    if found := _BACKGROUND.fullmatch(text):
        text = found[1]
        end = [{"kind": "background", "color": found[2]}]
    for prefix in _PREFIXES:
        if text.startswith(prefix) and (stated := _body(text[len(prefix) :])):
            return (*stated, *end)
    return None


def _body(text: str) -> Claims | None:
    alone = _NOTHING_ELSE.fullmatch(text)
    text = alone[1] if alone else text
    stated = _related(text) or _listing(text) or _counted(text)
    if stated is None:
        return None if alone else _word(text)
    if alone:
        objects = sum(c.get("count", 1) for c in stated if c["kind"] in ("object", "count"))
        if any(c.get("kind") == "word" for c in stated) or objects > MAX_OBJECTS:
            return None
        stated.append({"kind": "count", "object": {}, "count": objects})
    return stated


def _thing(groups: tuple[str | None, ...], plural: int) -> tuple[dict, Claims] | None:
    """Returns the reference to an object and the claims about its size and texture."""
    size, texture, color, shape, color_after, tail = groups
    if (color and color_after) or (texture and tail):
        return None
    ref = {"shape": _SHAPES[plural][shape]}
    if color or color_after:
        ref["color"] = _COLORS[color or color_after]
    more: Claims = []
    if size:
        more.append({"kind": "size", "object": ref, "size": _SIZES[size]})
    if texture or tail:
        kind = _TEXTURES[texture] if texture else _TAILS[tail]
        more.append({"kind": "texture", "object": ref, "texture": kind})
    return ref, more


def _parts(text: str, item: re.Pattern) -> list[re.Match] | None:
    """Splits a list of at most MAX_OBJECTS items, joined by commas, "and" or "with"."""
    found, at = [], 0
    while match := item.match(text, at):
        found.append(match)
        if match.end() == len(text):
            return found if len(found) <= MAX_OBJECTS else None
        joint = re.compile(", | and | with ").match(text, match.end())
        if not joint:
            return None
        at = joint.end()
    return None


def _listing(text: str) -> Claims | None:
    items = _parts(text, _ONE)
    things = [_thing(item.groups(), 0) for item in items or ()]
    if not things or None in things or not _distinct([ref for ref, _ in things]):
        return None
    return [c for ref, more in things for c in ({"kind": "object", "object": ref}, *more)]


def _counted(text: str) -> Claims | None:
    stated = []
    for item in _parts(text, _SEVERAL) or ():
        number, many, one = _NUMBERS[item[1]], item.groups()[1:7], item.groups()[7:]
        plural = int(number > 1)
        groups = many if plural else one
        thing = _thing(groups, plural) if groups[3] else None  # the shape
        if thing is None or thing[1]:
            return None
        stated.append({"kind": "count", "object": thing[0], "count": number})
    return stated if _distinct([c["object"] for c in stated]) else None


def _distinct(refs: list[dict]) -> bool:
    """Returns whether no object can answer two references, so that each needs its own object."""
    return bool(refs) and not any(a is not b and a.items() <= b.items() for a in refs for b in refs)


def _related(text: str) -> Claims | None:
    """Reads "A left of B", "left of B is A" and "A above the word W"."""
    words = _any(_RELATIONS)
    for relation in re.finditer(f"(?:^| (?:placed )?)({words}) ", text):
        before, after = text[: relation.start()], text[relation.end() :]
        meaning = _RELATIONS[relation[1]]
        if before:
            pairs = [(before, after)]
        else:
            pairs = [tuple(reversed(after.split(link, 1))) for link in (" is ", " there is ")
                     if link in after]  # fmt: skip
        for a, b in pairs:
            first, second = _listing(a), _listing(b) or _word(b)
            if not first or not second:
                continue
            refs = [_subject(first), _subject(second)]
            if None in refs or not _distinct(refs):
                continue
            claim = {"kind": "relation", "a": refs[0], "b": refs[1], "relation": meaning}
            return [*first, *second, claim]
    return None


def _subject(stated: Claims) -> dict | None:
    """Returns the only thing that claims are about, as a reference."""
    objects = [c["object"] for c in stated if c["kind"] == "object"]
    words = [{"word": c["word"]} for c in stated if c["kind"] == "word"]
    found = objects + words
    return found[0] if len(found) == 1 else None


def _word(text: str) -> Claims | None:
    found = _THE_WORD.fullmatch(text)
    if not found:
        return None
    color = {"color": _COLORS[found[2]]} if found[2] else {}
    return [{"kind": "word", "word": found[1], **color}]
