"""The claims of captions, and whether a picture (the description of an image) satisfies them.

A claim is a plain dict with a "kind". It refers to things by a dict `ref` of the attributes they
must have, such as {"shape": "circle", "color": "red"}. {} refers to any object, and {"word": "CAT"}
to the drawn word.

    {"kind": "object", "object": ref}                    at least one such object exists
    {"kind": "count", "object": ref, "count": 3}         exactly `count` such objects exist
    {"kind": "size", "object": ref, "size": "large"}     one of them has this size
    {"kind": "texture", "object": ref, "texture": ...}   one of them has this texture
    {"kind": "relation", "a": ref, "b": ref, "relation": "left of"}
    {"kind": "background", "color": "pale blue"}
    {"kind": "word", "word": "CAT"}                      with "color" if the caption names it
"""

from __future__ import annotations

from data_pipelines.scenes.phrases import NOUNS, with_article
from data_pipelines.scenes.scene import Picture, Thing, Word

# Two things have a relation along an axis only if their centers are farther apart than this (as a
# share of the image's side).
RELATION_MARGIN = 0.08


def reference(thing: Thing) -> dict:
    """Returns the reference to an object by shape and color."""
    return {"shape": thing.shape, "color": thing.color}


def about(thing: Thing) -> list[dict]:
    """Returns the claims of a noun phrase, which omits a normal size and a plain texture."""
    claims = [{"kind": "object", "object": reference(thing)}]
    if thing.size != "normal":
        claims.append({"kind": "size", "object": reference(thing), "size": thing.size})
    if thing.texture != "plain":
        claims.append({"kind": "texture", "object": reference(thing), "texture": thing.texture})
    return claims


def holds(claim: dict, picture: Picture) -> bool:
    """Returns whether `picture` satisfies a claim."""
    kind = claim["kind"]
    if kind == "background":
        return picture.background == claim["color"]
    if kind == "word":
        word = picture.word
        wanted = claim.get("color", word and word.color)
        return word is not None and (word.text, word.color) == (claim["word"], wanted)
    if kind == "relation":
        return any(
            _related(a, b, claim["relation"])
            for a in _find(claim["a"], picture)
            for b in _find(claim["b"], picture)
        )
    if kind not in ("object", "count", "size", "texture"):
        raise ValueError(f"claim kind {kind!r} is unknown")
    found = _find(claim["object"], picture)
    if kind == "object":
        return bool(found)
    if kind == "count":
        return len(found) == claim["count"]
    return any(getattr(thing, kind) == claim[kind] for thing in found)


def in_words(claim: dict) -> str:
    """Returns a claim as a short English phrase: "the red circle is large"."""
    kind = claim["kind"]
    if kind == "background":
        return f"the background is {claim['color']}"
    if kind == "word":
        color = f" in {claim['color']}" if "color" in claim else ""
        return f'the word "{claim["word"]}"{color}'
    if kind == "relation":
        return f"{_named(claim['a'])} is {claim['relation']} {_named(claim['b'])}"
    if kind == "object":
        return with_article(_words(claim["object"]))
    if kind == "count":
        return f"exactly {claim['count']} {_words(claim['object'], claim['count'] != 1)}"
    return f"{_named(claim['object'])} is {claim[kind]}"


def _words(ref: dict, plural: bool = False) -> str:
    noun = NOUNS[ref["shape"]][0][plural] if "shape" in ref else ("object", "objects")[plural]
    return f"{ref['color']} {noun}" if "color" in ref else noun


def _named(ref: dict) -> str:
    return f'the word "{ref["word"]}"' if "word" in ref else f"the {_words(ref)}"


def _find(ref: dict, picture: Picture) -> list[Thing | Word]:
    if "word" in ref:
        return [picture.word] if picture.word and picture.word.text == ref["word"] else []
    return [
        thing
        for thing in picture.objects
        if all(getattr(thing, key) == value for key, value in ref.items())
    ]


def _related(a: Thing | Word, b: Thing | Word, relation: str) -> bool:
    ahead = {
        "left of": b.x - a.x,
        "right of": a.x - b.x,
        "above": b.y - a.y,
        "below": a.y - b.y,
    }[relation]
    return ahead > RELATION_MARGIN
