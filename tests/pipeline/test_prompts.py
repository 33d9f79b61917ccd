"""What users hand to the samplers is read as they mean it, or refused in one line."""

import numpy as np
import pytest
from PIL import Image

from imagen_jax.common.errors import UserError
from imagen_jax.pipeline.prompts import make_requests, read_image, read_mask, read_prompts


def test_prompts_come_from_the_flag_a_text_file_or_a_csv(tmp_path):
    assert read_prompts("a red circle; two stars ", "") == ["a red circle", "two stars"]
    text, table = tmp_path / "p.txt", tmp_path / "p.csv"
    text.write_text("a red circle\n\n  two; stars\n", encoding="utf-8-sig")
    assert read_prompts("", str(text)) == ["a red circle", "two; stars"]
    table.write_text('id,caption\n1,"a circle, red"\n2,two stars\n')
    assert read_prompts("", str(table)) == ["a circle, red", "two stars"]


def test_a_way_leads_from_one_prompt_to_the_other_in_every_stage():
    def of(sr_prompts):
        way = make_requests(["a", "b"], sr_prompts, [7], frames=3)
        assert [(r.prompt, r.to_prompt, r.seed, r.fraction) for r in way] == [
            ("a", "b", 7, 0.0), ("a", "b", 7, 0.5), ("a", "b", 7, 1.0)
        ]  # fmt: skip
        return {(r.sr_prompt, r.to_sr_prompt) for r in way}

    assert of([]) == {("a", "b")}
    assert of(["c"]) == {("c", "c")}
    assert of(["c", "d"]) == {("c", "d")}


@pytest.mark.parametrize(
    ("prompts", "file", "words"),
    [
        ("", "", "give either --prompts"),
        ("a", "p.txt", "give either --prompts"),
        (" ; ", "", "--prompts holds no prompt"),
        ("a;;b", "", "--prompts: prompt 2 is empty"),
        ("", "none.txt", "cannot be read: No such file"),
        ("", "empty.txt", "holds no prompt"),
        ("", "latin.txt", "is not UTF-8 at byte 1"),
        ("", "other.csv", "has the columns id, title; one must be prompt, caption, text"),
    ],
)
def test_bad_prompts_are_one_line(tmp_path, prompts, file, words):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9 b")
    (tmp_path / "other.csv").write_text("id,title\n1,a\n")
    with pytest.raises(UserError) as e:
        read_prompts(prompts, str(tmp_path / file) if file else "")
    assert words in str(e.value) and "\n" not in str(e.value)


def test_a_picture_and_its_mask_come_as_arrays(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    np.testing.assert_array_equal(read_image("--image", tmp_path / "image.png", 8), pixels)
    for mode in ("L", "1"):
        mask = Image.new(mode, (8, 8))
        mask.paste(255, (0, 0, 4, 8))
        mask.save(tmp_path / "mask.png")
        read = read_mask("--mask", tmp_path / "mask.png", 8)
        assert read.shape == (8, 8, 1) and read[:, :4].all() and not read[:, 4:].any()


@pytest.mark.parametrize(
    ("mode", "size", "words"),
    [
        ("RGB", (8, 6), "is 8x6 in mode RGB; it must be 8x8 in mode RGB"),
        ("RGBA", (8, 8), "in mode RGBA"),
        ("L", (8, 8), "in mode L"),
        ("I;16", (8, 8), "in mode I;16"),
    ],
)
def test_a_picture_of_another_size_or_mode_is_one_line(tmp_path, mode, size, words):
    Image.new(mode, size).save(tmp_path / "image.png")
    with pytest.raises(UserError) as e:
        read_image("--image", str(tmp_path / "image.png"), 8)
    assert words in str(e.value)


def test_what_is_no_picture_is_one_line(tmp_path):
    (tmp_path / "image.png").write_text("hello")
    with pytest.raises(UserError, match="is no picture"):
        read_image("--image", tmp_path / "image.png", 8)
    with pytest.raises(UserError, match="there is no such file"):
        read_image("--image", tmp_path / "none.png", 8)
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    with pytest.raises(UserError, match="black all over"):
        read_mask("--mask", tmp_path / "black.png", 8)
