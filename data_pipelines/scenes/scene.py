"""The description of a scene: what is drawn where, and what its caption claims."""

from __future__ import annotations

import dataclasses
import json


@dataclasses.dataclass(frozen=True)
class Thing:
    """One drawn shape; x, y (center of its bounding box) and radius are shares of the side."""

    shape: str
    color: str
    size: str = "normal"
    texture: str = "plain"
    x: float = 0.5
    y: float = 0.5
    radius: float = 0.3


@dataclasses.dataclass(frozen=True)
class Word:
    """Drawn capital letters; x, y (center) and height are shares of the image side."""

    text: str
    color: str
    x: float
    y: float
    height: float


@dataclasses.dataclass(frozen=True)
class Picture:
    """What a picture shows; either as it was drawn or as it was read back from pixels."""

    background: str
    objects: tuple[Thing, ...]
    word: Word | None


@dataclasses.dataclass(frozen=True)
class Scene(Picture):
    """A picture with its caption, the caption's category and the claims that the caption makes.

    `claims` are plain dicts, see claims.py.
    """

    caption: str
    category: str
    claims: tuple[dict, ...]

    def to_json(self) -> str:
        """This scene as one line of JSON; `from_json` gives an equal scene back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Scene:
        """The scene that `to_json` wrote."""
        fields = json.loads(text)
        fields["objects"] = tuple(Thing(**thing) for thing in fields["objects"])
        fields["word"] = Word(**fields["word"]) if fields["word"] else None
        fields["claims"] = tuple(fields["claims"])
        return cls(**fields)
