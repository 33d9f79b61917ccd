"""Folders of pictures with prompts: the formats, and one line for each mistake."""

import pytest
from PIL import Image
from ratings import PROMPTS, write_samples

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation.rating import folders


def picture(path):
    Image.new("RGB", (8, 8)).save(path)


def test_a_folder_of_samples(tmp_path):
    folder = write_samples(tmp_path / "s", num=3)
    picture(folder / "grid.png")
    found = folders.read(folder, "a")
    assert list(found.pictures) == PROMPTS and not found.categories
    assert [f.name for f in found.pictures[PROMPTS[1]]] == ["00003.png", "00004.png", "00005.png"]


def test_a_prompt_that_was_given_twice_counts_once(tmp_path):
    folder = write_samples(tmp_path / "s", ["a", "a"], num=2)
    assert [len(files) for files in folders.read(folder, "a").pictures.values()] == [2]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "a cat\na dog\n"),
        (
            "metadata.jsonl",
            '{"file_name": "0.png", "text": "a cat"}\n{"file_name": "1.png", "text": "a cat"}\n'
            '{"file_name": "2.png", "text": "a dog"}\n{"file_name": "3.png", "text": "a dog"}\n',
        ),
        (
            "metadata.csv",
            "file_name,caption,category\n"
            "0.png,a cat,A\n1.png,a cat,A\n2.png,a dog,B\n3.png,a dog,B",
        ),
    ],
)
def test_plain_folders(tmp_path, name, text):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    (tmp_path / name).write_text(text)
    found = folders.read(tmp_path, "b")
    names = {prompt: [f.name for f in files] for prompt, files in found.pictures.items()}
    assert names == {"a cat": ["0.png", "1.png"], "a dog": ["2.png", "3.png"]}
    expected = {"a cat": ["A"], "a dog": ["B"]} if name.endswith("csv") else {}
    assert found.categories == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("x.txt", "", "has no list of prompts; write samples.json"),
        ("samples.json", "{", "samples.json cannot be read"),
        ("samples.json", "{}", "it must be a list"),
        ("samples.json", '[{"file": "0.png"}]', "entry 1: it needs file and prompt"),
        ("samples.json", '[{"file": "9.png", "prompt": "a"}]', "there is no such file"),
        ("samples.json", '[{"file": "../0.png", "prompt": "a"}]', "outside of the folder"),
        ("samples.json", "[]", "names no picture"),
        ("prompts.txt", "a\nb", "has 2 prompts for 1 pictures"),
        ("metadata.jsonl", "x", "line 1 is not JSON"),
        ("metadata.csv", "file,prompt\n0.png,a", "row 1: it needs file_name"),
    ],
)
def test_mistakes_are_one_line(tmp_path, name, text, words):
    picture(tmp_path / "0.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as e:
        folders.read(tmp_path, "a")
    assert words in str(e.value) and "\n" not in str(e.value)
    assert str(e.value).startswith(f"--a={tmp_path}")


def test_other_prompts_are_refused(tmp_path):
    a = folders.read(write_samples(tmp_path / "a"), "a")
    b = folders.read(write_samples(tmp_path / "b", [*PROMPTS[1:], "more"]), "b")
    with pytest.raises(UserError, match=r"b has other prompts than --a=.*1 are missing and 1 are"):
        folders.check_same_prompts([a, b])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("d.csv", 'Prompts,Category\n"a, b",Colors\nc,Text\n'),
        ("d.csv", '"a, b",Colors\nc,Text\n'),
        ("p.tsv", "Prompt\tCategory\tChallenge\na, b\tColors\tx\nc\tText\ty\n"),
    ],
)
def test_categories(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert folders.read_categories(tmp_path / name) == {"a, b": ["Colors"], "c": ["Text"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Prompts,Kind,x\na,b,c", "has the columns prompts, kind, x"),
        ("Prompts,Category\na,\n", "row 1 lacks"),
        ("Prompts,Category\n", "holds no prompt"),
        ("", "has the columns"),
    ],
)
def test_bad_categories(tmp_path, text, words):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        folders.read_categories(tmp_path / "c.csv")
