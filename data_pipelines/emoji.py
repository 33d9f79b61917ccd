r"""Prepares the emoji of a color font, with their Unicode names as captions.

    python -m data_pipelines.emoji --data_dir=data

Needs the Noto Color Emoji font (Debian package fonts-noto-color-emoji). With Unicode's
emoji-test.txt (package unicode-data) it draws about 3,600 emoji, among them flags, families and
skin tones, captioned by their short names. Without it, it draws about 1,200 single characters,
captioned by the names in Python's Unicode database.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.records import dataset, splits, writing
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
EMOJI_TEST = "/usr/share/unicode/emoji/emoji-test.txt"
# The font has bitmaps of this size only; each fills this box.
POINTS = 109
BOX = (0, 0, 136, 128)


class Emoji(NamedTuple):
    """A character or sequence, its name and its group."""

    text: str
    name: str
    group: str


def read_emoji_test(path: str) -> list[Emoji]:
    """Reads the fully qualified emoji of Unicode's emoji-test.txt (UTS #51)."""
    found, group = [], ""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        if line.startswith("# group:"):
            group = line.partition(":")[2].strip()
        code_points, _, rest = line.partition(";")
        if rest.strip().startswith("fully-qualified"):
            # "fully-qualified     # <emoji> E0.6 grinning face"
            name = rest.partition("#")[2].split(maxsplit=2)[2]
            text = "".join(chr(int(code, 16)) for code in code_points.split())
            found.append(Emoji(text, name, group))
    if not found:
        raise UserError(f"--emoji_test={path} has no line with 'fully-qualified'")
    return found


def single_characters(font: ImageFont.FreeTypeFont) -> Iterator[Emoji]:
    """Yields the single-character symbols in the font, named by Python's Unicode database."""
    for character in map(chr, range(0x2000, 0x20000)):
        if unicodedata.category(character) == "So" and font.getbbox(character) == BOX:
            yield Emoji(character, unicodedata.name(character).lower(), "")


def draw(text: str, font: ImageFont.FreeTypeFont, resolution: int) -> Image.Image | None:
    """Draws an emoji on white, [resolution, resolution]; None if the font has no glyph for it."""
    if font.getbbox(text) != BOX:  # empty without a glyph, wider if drawn as several glyphs
        return None
    side = max(BOX)
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text((0, (side - BOX[3]) // 2), text, font=font, embedded_color=True)
    return image.resize((resolution, resolution), Image.Resampling.BICUBIC)


def load_record(emoji: Emoji, *, font_path: str, resolution: int) -> dict[str, Any] | dataset.Skip:
    """Makes a record of an emoji."""
    codes = "-".join(f"{ord(character):x}" for character in emoji.text)
    # Fonts are not thread-safe; opening one costs less than drawing.
    image = draw(emoji.text, open_font(font_path), resolution)
    if image is None:
        return dataset.Skip(codes, "no glyph in the font", emoji.name)
    return {
        "id": codes,
        "image": dataset.png_bytes(image),
        "caption": emoji.name,
        "category": emoji.group,
        "scene": "",
    }


def open_font(path: str) -> ImageFont.FreeTypeFont:
    """Opens the font at the size of its bitmaps.

    Raises:
      UserError: the file is missing, or has no bitmaps of that size.
    """
    if not Path(path).is_file():
        raise UserError(
            f"--font={path} does not exist; install the Debian package fonts-noto-color-emoji, or "
            "give the path of NotoColorEmoji.ttf"
        )
    try:
        return ImageFont.truetype(path, POINTS)
    except OSError as e:
        raise UserError(f"--font={path} has no bitmaps of {POINTS} pixels: {e}") from e


class EmojiBuilder(dataset.RecordsBuilder):
    """Builds a dataset from the emoji of a font; `hold_out` chooses the validation split."""

    name = "emoji"

    def __init__(
        self,
        *,
        data_dir: str,
        encoder,
        font: str = FONT,
        emoji_test: str = "",
        resolution: int = 64,
        validation_fraction: float = 0.02,
        seed: int = 0,
    ):
        opened = open_font(font)
        found = read_emoji_test(emoji_test) if emoji_test else list(single_characters(opened))
        if not found:
            raise UserError(f"--font={font} has no emoji with bitmaps of {BOX[2]}x{BOX[3]}")
        load = partial(load_record, font_path=font, resolution=resolution)
        super().__init__(
            data_dir=data_dir,
            splits=partial(writing.hold_out, found, load, validation_fraction, seed),
            encoder=encoder,
            settings={
                "font": hashlib.sha256(Path(font).read_bytes()).hexdigest()[:8],
                "names": hashlib.sha256(ascii(found).encode()).hexdigest()[:8],
                "resolution": resolution,
                "validation_fraction": validation_fraction,
                "seed": seed,
            },
        )


def define_flags() -> None:
    flags.DEFINE_string("font", FONT, "Path of Noto Color Emoji, the version with bitmaps.")
    flags.DEFINE_string(
        "emoji_test",
        EMOJI_TEST if Path(EMOJI_TEST).is_file() else "",
        f"Path of Unicode's emoji-test.txt (default: {EMOJI_TEST} if it exists); empty for the "
        "names in Python's Unicode database.",
    )
    flags.DEFINE_integer(
        "resolution", 64, f"Side of the images in pixels; the font's is {max(BOX)}.", 1
    )
    flags.DEFINE_float(
        "validation_fraction",
        0.02,
        f"Share of emoji held out, but at least {splits.GRID} and at most half; 0 for none.",
        0,
        0.5,
    )
    flags.adopt_module_key_flags(writing)


def main(argv: list[str]) -> None:
    del argv
    options = ("data_dir", "font", "emoji_test", "resolution", "validation_fraction", "seed")
    if flags.FLAGS.emoji_test and not Path(flags.FLAGS.emoji_test).is_file():
        raise UserError(f"--emoji_test={flags.FLAGS.emoji_test} does not exist")
    open_font(flags.FLAGS.font)  # before the encoder is loaded
    builder = EmojiBuilder(
        **{name: flags.FLAGS[name].value for name in options},
        encoder=writing.encoder_from_flags(),
    )
    writing.prepare(builder, overwrite=flags.FLAGS.overwrite)


if __name__ == "__main__":
    writing.define_flags()
    define_flags()
    cli.run(main)
