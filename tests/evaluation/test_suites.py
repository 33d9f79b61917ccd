"""Suites are recognized in the formats in which they are published, or refused in one line."""

import json

import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation import suites

DRAWBENCH = [("A red car.", "Colors"), ("Two cats, one dog.", "Counting"), ('"Hi" here', "Text")]


def lines(rows, separator=","):
    quote = lambda cell: '"' + cell.replace('"', '""') + '"'  # noqa: E731
    return "".join(separator.join(map(quote, row)) + "\n" for row in rows)


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


COCO = {
    "images": [{"id": 7}],
    "annotations": [
        {"id": i, "image_id": i // 5, "caption": f"A photo of number {i}. \n"} for i in range(40)
    ],
}
GENEVAL = jsonl(
    {"tag": "two_object", "include": [{"class": "bench", "count": 1}], "prompt": "a bench"},
    {"tag": "counting", "include": [{"class": "cow", "count": 3}], "prompt": "three cows"},
)
GENEVAL2 = {
    "prompt": "four white bicycles",
    "atom_count": 3,
    "vqa_list": [["How many bicycles are there?", "four"], ["Are the bicycles white?", "Yes"]],
    "skills": ["count", "attribute"],
}
DSG = (
    "item_id,text,keywords,proposition_id,dependency,category_broad,category_detailed,tuple,"
    "question_natural_language\n"
    'drawtext_5,a cat on a mat,cat,1,0,entity,whole,"entity - whole (cat)",Is there a cat?\n'
    'drawtext_5,a cat on a mat,mat,2,0,entity,whole,"entity - whole (mat)",Is there a mat?\n'
    'drawtext_5,a cat on a mat,"cat, mat",3,"1,2",relation,spatial,x,Is the cat on the mat?\n'
    "whoops_12,a dog,dog,1,0,entity,whole,x,Is there a dog?\n"
)
TIFA = [
    {
        "id": "coco_301091", "caption": "Three cats.", "question": "how many cats are there?",
        "choices": ["1", "2", "3"], "answer": "3", "element_type": "counting", "element": "three",
    },
    {
        "id": "coco_301091", "caption": "Three cats.", "question": "are there cats?",
        "choices": ["yes", "no"], "answer": "yes", "element_type": "animal", "element": "cats",
    },
]  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(text, name="suite.csv"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else json.dumps(text), "utf-8-sig")
        return path

    return write


def pairs(suite):
    return [(e["caption"], e["category"]) for e in suite.examples]


@pytest.mark.parametrize(
    "text",
    [
        lines([("Prompts", "Category"), *DRAWBENCH]),
        lines(DRAWBENCH),
        lines([("", ""), *DRAWBENCH]),
        lines([("Unnamed: 0", "Unnamed: 1"), *DRAWBENCH]),
    ],
    ids=["names", "bare", "empty names", "pandas"],
)
def test_both_forms_of_drawbench_are_read(write, text):
    suite = suites.read(write(text))
    assert suite.name == "drawbench" and pairs(suite) == DRAWBENCH
    assert len(suite.record["file_sha256"]) == 64


@pytest.mark.parametrize(
    ("text", "file", "name", "expected"),
    [
        (
            "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\tsome\n42\tPeople\tX\t\n",
            "PartiPrompts.tsv", "partiprompts", [("bond", "Abstract"), ("42", "People")],
        ),
        (GENEVAL, "m.jsonl", "geneval", [("a bench", "two_object"), ("three cows", "counting")]),
        (jsonl(GENEVAL2), "g.jsonl", "geneval2", [("four white bicycles", "3 atoms")]),
        (DSG, "dsg.csv", "dsg", [("a cat on a mat", "drawtext"), ("a dog", "whoops")]),
        (TIFA, "tifa.json", "tifa", [("Three cats.", "coco")]),
        ("a cat, a dog\n\n[x] y\n", "p.txt", "prompts", [("a cat, a dog", ""), ("[x] y", "")]),
        ("[x] y\n", "p.txt", "prompts", [("[x] y", "")]),
        ("id,caption\n7,a dog\n", "p.csv", "prompts", [("a dog", "")]),
        (jsonl({"prompt": "a"}), "p.jsonl", "prompts", [("a", "")]),
    ],
)  # fmt: skip
def test_suites_are_recognized(write, text, file, name, expected):
    suite = suites.read(write(text, file))
    assert suite.name == name and pairs(suite) == expected


def test_coco_captions_are_drawn_by_a_seed(write):
    path = write(COCO, "captions_val2014.json")
    some, same = suites.read(path, 10, 1), suites.read(path, 10, 1)
    ids = [e["id"] for e in some.examples]
    assert ids == [e["id"] for e in same.examples] and len(set(ids)) == 10
    assert ids != [e["id"] for e in suites.read(path, 10, 2).examples]
    assert ids == [e["id"] for e in suites.read(path, 20, 1).examples[:10]]
    first = some.examples[0]
    assert first["caption"] == f"A photo of number {first['id']}."
    assert len(suites.read(path).examples) == 40 and some.record["draw_seed"] == 1


def test_dpg_bench_is_a_folder_and_gets_its_questions(tmp_path, write):
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name, text in (("10", "ten\n"), ("9", "nine\n lines "), ("drawtext_5", "a cat")):
        (folder / f"{name}.txt").write_text(text)
    suite = suites.read(folder)
    assert [e["id"] for e in suite.examples] == ["9", "10", "drawtext_5"]
    assert suite.name == "dpg-bench" and suite.examples[0]["caption"] == "nine lines"
    questions = write(DSG, "dpg_bench.csv")
    with pytest.raises(UserError, match="has no questions for 2 of 3 prompts; the first is 'nine"):
        suites.with_questions(suite, questions)
    asked = suites.with_questions(suite._replace(examples=suite.examples[2:]), questions)
    texts = [q.text for q in asked.examples[0]["questions"]]
    assert texts == ["Is there a cat?", "Is there a mat?", "Is the cat on the mat?"]
    assert [q.parents for q in asked.examples[0]["questions"]] == [(), (), (0, 1)]


@pytest.mark.parametrize(
    ("text", "file", "words"),
    [
        (lines([("Prompts", "Category"), ("A car", "")]), "s.csv", "prompt 1 has no category"),
        (lines([("Prompts", "Category"), ("", "Text")]), "s.csv", "prompt 0 is empty"),
        (lines([("a", "b", "c"), ("1", "2", "3")]), "s.csv", "columns a, b, c; one must be"),
        (lines([("Prompts", "Category"), ("A car",)]), "s.csv", "row 2 has 1 cells; the head"),
        ("Prompt\tChallenge\tNote\nx\ty\tz\n", "p.tsv", "note; category is missing"),
        ("item_id,question_natural_language\n1,Is it?\n", "d.csv", "text, proposition_id, depend"),
        ({"annotations": [{"id": 1, "image_id": 2}]}, "c.json", "annotation 1 has no 'caption'"),
        (jsonl(GENEVAL2 | {"skills": ["count"]}), "g.jsonl", "2 questions and 1 skills; their num"),
        (jsonl({"text": "x"}), "g.jsonl", "line 1 has no 'prompt'"),
        ("{broken\n", "g.jsonl", "is neither JSON nor JSONL"),
        ("", "p.txt", "has no prompt"),
    ],
)  # fmt: skip
def test_bad_suites_are_one_line(write, text, file, words):
    with pytest.raises(UserError) as error:
        suites.read(write(text, file))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_missing_files_and_too_few_prompts_are_one_line(write, tmp_path):
    with pytest.raises(UserError, match="--prompts=/nowhere cannot be read"):
        suites.read(suites.Path("/nowhere"))
    with pytest.raises(UserError, match=r"--num is 4, but .* has 3 prompts"):
        suites.read(write(lines(DRAWBENCH)), 4)
    with pytest.raises(UserError, match=r"holds no \.txt file"):
        suites.read(tmp_path / "..")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8 at byte 0"):
        suites.read(tmp_path / "latin")
    suite = suites.read(write(lines(DRAWBENCH)))
    with pytest.raises(UserError, match="has no questions; allowed: the files of DSG"):
        suites.with_questions(suite, write(lines(DRAWBENCH), "q.csv"))
