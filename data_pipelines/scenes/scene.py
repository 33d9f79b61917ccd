"""The description of a scene: its things, their places, its caption and the caption's claims."""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass(frozen=True)
class Thing:
    """A drawn shape. x, y (the center of its bounding box) and radius are shares of the side."""

    shape: str
    color: str
    size: str = "normal"
    texture: str = "plain"
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.3


@dataclasses.dataclass(frozen=True)
class Word:
    """Drawn capital letters. x, y (the center) and height are shares of the image's side."""

    text: str
    color: str
    x: float
    y: float
    height: float


@dataclasses.dataclass(frozen=True)
class Picture:
    """The contents of an image, as drawn or as read back from its pixels."""

    background: str
    objects: tuple[Thing, ...]
    word: Word | None


@dataclasses.dataclass(frozen=True)
class Scene(Picture):
    """A picture with its caption, the caption's category and its claims (see claims.py)."""

    caption: str
    category: str
    claims: tuple[dict, ...]

    def to_json(self) -> str:
        """Encodes the scene as one line of JSON, from which `from_json` makes an equal scene."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """Decodes a scene from `to_json`."""
        fields = json.loads(text)
        fields["objects"] = tuple(Thing(**thing) for thing in fields["objects"])
        fields["word"] = Word(**fields["word"]) if fields["word"] else None
        fields["claims"] = tuple(fields["claims"])
        return cls(**fields)
