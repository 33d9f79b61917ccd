"""Emoji: names from Unicode, drawing, and records."""

from pathlib import Path

import numpy as np
import pytest
from encoders import ByteEncoder

from data_pipelines import emoji
from data_pipelines.reading import tasks
from data_pipelines.records import dataset, writing
from imagen_jax.common.errors import UserError

needs_font = pytest.mark.skipif(
    not Path(emoji.FONT).is_file(), reason=f"no {emoji.FONT}: Debian package fonts-noto-color-emoji"
)

EMOJI_TEST = """\
# group: Smileys & Emotion
1F600                  ; fully-qualified     # \U0001f600 E1.0 grinning face
263A FE0F              ; fully-qualified     # \u263a\ufe0f E0.6 smiling face
263A                   ; unqualified         # \u263a E0.6 smiling face
# group: Flags
1F1EB 1F1F7            ; fully-qualified     # \U0001f1eb\U0001f1f7 E0.6 flag: France
10FFFD                 ; fully-qualified     # \U0010fffd E99.0 nothing like it
"""


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "emoji-test.txt"
    path.write_text(EMOJI_TEST, encoding="utf-8")
    return str(path)


def test_reads_the_fully_qualified_emoji(names):
    assert emoji.read_emoji_test(names) == [
        ("\U0001f600", "grinning face", "Smileys & Emotion"),
        ("\u263a\ufe0f", "smiling face", "Smileys & Emotion"),
        ("\U0001f1eb\U0001f1f7", "flag: France", "Flags"),
        ("\U0010fffd", "nothing like it", "Flags"),
    ]


def test_the_error_for_a_missing_font_names_flag_and_package(tmp_path):
    with pytest.raises(UserError, match=r"--font=.*none.ttf.*fonts-noto-color-emoji"):
        emoji.EmojiBuilder(
            data_dir=str(tmp_path), encoder=ByteEncoder(), font=str(tmp_path / "none.ttf")
        )


def test_a_file_that_is_not_a_font_is_refused(names):
    with pytest.raises(UserError, match=r"--font=.*emoji-test.txt has no bitmaps"):
        emoji.open_font(names)


def test_a_file_without_names_is_refused(tmp_path):
    path = tmp_path / "other.txt"
    path.write_text("hello")
    with pytest.raises(UserError, match=r"--emoji_test=.*other.txt"):
        emoji.read_emoji_test(str(path))


@needs_font
def test_draws_records_and_counts_missing_glyphs(tmp_path, names):
    builder = emoji.EmojiBuilder(
        data_dir=str(tmp_path),
        encoder=ByteEncoder(),
        emoji_test=names,
        resolution=48,
        validation_fraction=0,
    )
    writing.prepare(builder)
    rows = list(tasks.RecordsSource("emoji", str(tmp_path)).get_dataset("train", shuffle=False))
    assert [row["id"].numpy().decode() for row in rows] == ["1f600", "263a-fe0f", "1f1eb-1f1f7"]
    assert [s.name for s in builder.report["skipped"]] == ["10fffd"]
    face, _, flag = (row["image"].numpy() for row in rows)
    assert face.shape == (48, 48, 3) and (face[[0, 0, -1, -1], [0, -1, 0, -1]] == 255).all()
    np.testing.assert_array_less([200, 150, -1], face[24, 24])  # yellow
    assert face[24, 24, 2] < 100
    blue, white, red = flag[24, 8], flag[24, 24], flag[24, 40]
    assert blue.argmax() == 2 and white.min() > 220 and red.argmax() == 0


@needs_font
def test_names_of_single_characters_come_from_python():
    found = {e.text: e.name for e in emoji.single_characters(emoji.open_font(emoji.FONT))}
    assert len(found) > 1000 and found["\U0001f600"] == "grinning face"
    assert emoji.draw("x", emoji.open_font(emoji.FONT), 32) is None


def test_skip_reasons_are_counted():
    skipped = [dataset.Skip("a", "x"), dataset.Skip("b", "y"), dataset.Skip("c", "y")]
    assert dataset.summary(skipped) == "y 2, x 1"
