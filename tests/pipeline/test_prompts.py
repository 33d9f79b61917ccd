"""Prompts are read as users mean them, or refused in one line."""

import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.pipeline.prompts import make_requests, read_prompts
from imagen_jax.pipeline.settings import SettingError, Settings


def test_prompts_come_from_the_flag_a_text_file_or_a_csv(tmp_path):
    assert read_prompts("a red circle; two stars ", "") == ["a red circle", "two stars"]
    text, table = tmp_path / "p.txt", tmp_path / "p.csv"
    text.write_text("a red circle\n\n  two; stars\n", encoding="utf-8-sig")
    assert read_prompts("", str(text)) == ["a red circle", "two; stars"]
    table.write_text('id,caption\n1,"a circle, red"\n2,two stars\n')
    assert read_prompts("", str(table)) == ["a circle, red", "two stars"]


def test_each_prompt_is_sampled_with_each_seed():
    requests = make_requests(["a", "b"], Settings(seed=5, num=2, sr_prompts="c"))
    assert [(r.prompt, r.seed, r.sr_prompt) for r in requests] == [
        ("a", 5, "c"), ("a", 6, "c"), ("b", 5, "c"), ("b", 6, "c")
    ]  # fmt: skip
    assert make_requests("a;b", Settings()) == make_requests(["a;b"], Settings())


def test_frames_interpolate_the_prompts_of_every_stage():
    def sr_prompts_of(sr_prompts):
        requests = make_requests(["a", "b"], Settings(sr_prompts=sr_prompts, seed=7, frames=3))
        assert [(r.prompt, r.to_prompt, r.seed, r.fraction) for r in requests] == [
            ("a", "b", 7, 0.0), ("a", "b", 7, 0.5), ("a", "b", 7, 1.0)
        ]  # fmt: skip
        return {(r.sr_prompt, r.to_sr_prompt) for r in requests}

    assert sr_prompts_of(None) == {("a", "b")}
    assert sr_prompts_of(["c"]) == {("c", "c")}
    assert sr_prompts_of(["c", "d"]) == {("c", "d")}


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "prompts is empty; it must be a string or a list of strings"),
        (["a", 3], {}, "prompts is 3; it must be a string"),
        ("a", {"negative_prompt": 3}, "negative_prompt is 3; it must be a string"),
        ("a", {"sr_prompts": ["b", "c"]}, "sr_prompts has 2 prompts; allowed: 1 or 1"),
        ("a", {"frames": 3}, "frames=3 with 1 prompt(s); allowed: 2 or more frames between 2"),
        (["a", "b"], {"frames": 1}, "frames=1 with 2 prompt(s)"),
        ("a", {"to_seed": 3}, "to_seed=3 needs frames"),
    ],
)
def test_wrong_numbers_of_prompts_are_one_line_errors(prompts, settings, message):
    with pytest.raises(SettingError) as e:
        make_requests(prompts, Settings(**settings))
    assert str(e.value).startswith(message) and "\n" not in str(e.value)


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
def test_unreadable_prompts_are_one_line_errors(tmp_path, prompts, file, words):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"a\xe9 b")
    (tmp_path / "other.csv").write_text("id,title\n1,a\n")
    with pytest.raises(UserError) as e:
        read_prompts(prompts, str(tmp_path / file) if file else "")
    assert words in str(e.value) and "\n" not in str(e.value)
