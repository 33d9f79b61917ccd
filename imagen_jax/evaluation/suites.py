"""Suites of prompts, read from the files in which they are published.

| suite | file |
|---|---|
| drawbench | CSV with the columns Prompts and Category, or two columns without names |
| partiprompts | TSV with the columns Prompt, Category, Challenge and Note |
| coco | captions JSON: {"annotations": [{"id", "image_id", "caption"}]} |
| geneval | JSONL with "tag" and "prompt" in each line |
| geneval2 | JSONL with "prompt", "atom_count", "vqa_list" and "skills" in each line |
| dpg-bench | folder of .txt files, one prompt each |
| dsg | CSV with item_id, text, proposition_id, dependency and question_natural_language |
| tifa | JSON list of {"id", "caption", "question", "choices", "answer"} |
| prompts | CSV or JSONL with a prompt in each row, or any text file: one prompt a line |

The content of a file decides which suite it is.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import sha256
from imagen_jax.evaluation.metric import Example
from imagen_jax.evaluation.questions import Question, dsg_question, tifa_question

# The categories of DrawBench (section 4.1 of the paper).
DRAWBENCH = (
    *("Colors", "Conflicting", "Counting", "DALL-E", "Descriptions", "Gary Marcus et al."),
    *("Misspellings", "Positional", "Rare Words", "Reddit", "Text"),
)
COCO_PROMPTS = 30_000  # FID-30K
PROMPT_COLUMNS = ("prompts", "prompt", "caption", "text")
DSG_COLUMNS = ("item_id", "text", "proposition_id", "dependency", "question_natural_language")


class Suite(NamedTuple):
    """Prompts to sample.

    Attributes:
      name: drawbench, coco and so on; for the captions of a dataset, its task and split.
      examples: each with id, caption and category; see metric.Example.
      record: where they come from, for the protocol.
    """

    name: str
    examples: Sequence[Example]
    record: dict[str, Any]


def read(path: Path, num: int | None = None, seed: int = 0, flag: str = "prompts") -> Suite:
    """Reads the prompts of a file or folder.

    Args:
      num: number of prompts (default: all; 30,000 of COCO's captions). They are the first ones; of
        COCO's, `seed` draws them.
      flag: the flag that has the path.

    Raises:
      UserError: it cannot be read, a column is missing, a category is empty, or there are fewer
        than `num` prompts.
    """
    where = f"--{flag}={path}"
    if path.is_dir():
        name, examples, files = "dpg-bench", *_folder(path, where)
    else:
        name, examples = _file(_text(path, where), path.suffix.lower(), where)
        files = [path]
    if empty := [e["id"] for e in examples if not e["caption"].strip()]:
        raise UserError(f"{where}: prompt {empty[0]} is empty")
    record = {"suite": name, "file": path.name, "file_sha256": sha256(files)}
    if name == "coco":
        num = min(COCO_PROMPTS, len(examples)) if num is None else num
        record["draw_seed"] = seed
    check_num(num, len(examples), where)
    if name == "coco":
        chosen = np.random.default_rng(seed).permutation(len(examples))[:num]
        examples = [examples[i] for i in chosen]
    return Suite(name, examples[:num], record)


def check_num(num: int | None, available: int, where: str) -> None:
    """Raises UserError if fewer prompts are there than --num asks for."""
    if not available:
        raise UserError(f"{where} has no prompt")
    if num is not None and num > available:
        raise UserError(f"--num is {num}, but {where} has {available} prompts")


def _text(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as e:
        raise UserError(f"{where} cannot be read: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"{where} is not UTF-8 at byte {e.start}") from e


def _folder(folder: Path, where: str) -> tuple[list[Example], list[Path]]:
    """Returns the prompts of a folder of text files, in the order of their numbers."""
    files = sorted(folder.glob("*.txt"), key=lambda p: (p.stem.zfill(12), p.stem))
    if not files:
        raise UserError(f"{where} holds no .txt file; a folder must have one prompt in each")
    return [_example(p.stem, " ".join(_text(p, where).split())) for p in files], files


def _file(text: str, suffix: str, where: str) -> tuple[str, list[Example]]:
    """Returns the suite's name and its prompts."""
    if suffix != ".txt" and text.lstrip()[:1] in ("{", "["):
        return _json(text, where)
    lines = text.splitlines()
    delimiter = "\t" if lines and "\t" in lines[0] else ","
    rows = [row for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    header = [name.strip().lower() for name in rows[0]] if rows else []
    if "question_natural_language" in header:
        return "dsg", _dsg(_dicts(header, rows[1:], DSG_COLUMNS, where))
    named = any(name in PROMPT_COLUMNS for name in header)
    if suffix in (".csv", ".tsv") or (named and len(header) > 1):
        return _table(header, rows, named, where)
    prompts = [line.strip() for line in lines if line.strip()]
    return "prompts", [_example(str(i), prompt) for i, prompt in enumerate(prompts)]


def _table(
    header: list[str], rows: list[list[str]], named: bool, where: str
) -> tuple[str, list[Example]]:
    """Reads DrawBench, PartiPrompts, and other tables with a prompt in each row."""
    parti = "challenge" in header
    if named:
        column = next(name for name in PROMPT_COLUMNS if name in header)
        needed = (column, *(("category",) if parti or "category" in header else ()))
        found = _dicts(header, rows[1:], needed, where)
    elif rows and all(len(row) == 2 for row in rows):
        column, needed = "prompt", ("prompt", "category")
        unnamed = re.match(r"(unnamed.*)?$", header[0]) is not None
        found = _dicts(list(needed), rows[1:] if unnamed else rows, needed, where)
    else:
        columns = ", ".join(header) or "nothing"
        raise UserError(
            f"{where} has the columns {columns}; one must be {', '.join(PROMPT_COLUMNS)}"
        )
    examples = []
    for i, row in enumerate(found):
        if "category" in needed and not row["category"].strip():
            raise UserError(f"{where}: prompt {i + 1} has no category: {row[column]!r}")
        category = row.get("category", "").strip()
        examples.append(_example(str(i), row[column].strip(), category))
    known = {e["category"] for e in examples} <= {*DRAWBENCH}
    return ("partiprompts" if parti else "drawbench" if known else "prompts"), examples


def _dicts(
    header: list[str], rows: list[list[str]], needed: Sequence[str], where: str
) -> list[dict[str, str]]:
    """Returns the rows by column.

    Raises:
      UserError: a column is missing, or a row has another number of cells than the header.
    """
    if missing := [name for name in needed if name not in header]:
        raise UserError(
            f"{where} has the columns {', '.join(header)}; {', '.join(missing)} is missing"
        )
    for i, row in enumerate(rows, start=2):
        if len(row) != len(header):
            raise UserError(f"{where}: row {i} has {len(row)} cells; the header has {len(header)}")
    return [dict(zip(header, row, strict=True)) for row in rows]


def _json(text: str, where: str) -> tuple[str, list[Example]]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if isinstance(value, list):
        return "tifa", _tifa(value, where)
    if isinstance(value, dict) and "annotations" in value:
        keys = ("id", "image_id", "caption")
        found = value["annotations"]
        _require_keys(found, keys, f"{where}: annotation")
        return "coco", [
            _example(str(a["id"]), " ".join(a["caption"].split()), image_id=a["image_id"])
            for a in found
        ]
    lines = [line for line in text.splitlines() if line.strip()]
    try:
        found = [json.loads(line) for line in lines]
    except ValueError as e:
        raise UserError(f"{where} is neither JSON nor JSONL ({e})") from e
    _require_keys(found, ("prompt",), f"{where}: line")
    if "vqa_list" in found[0]:
        return "geneval2", _geneval2(found, where)
    if "tag" in found[0]:
        _require_keys(found, ("prompt", "tag"), f"{where}: line")
        return "geneval", [_example(f"{i:05d}", r["prompt"], r["tag"]) for i, r in enumerate(found)]
    return "prompts", [
        _example(str(i), r["prompt"], str(r.get("category", ""))) for i, r in enumerate(found)
    ]


def _require_keys(rows: Any, keys: Sequence[str], where: str) -> None:
    for i, row in enumerate(rows if isinstance(rows, list) else [rows], start=1):
        for key in keys:
            if not isinstance(row, dict) or row.get(key) in (None, ""):
                raise UserError(f"{where} {i} has no {key!r}")


def _geneval2(rows: list[dict], where: str) -> list[Example]:
    """Reads GenEval 2 (arXiv:2512.16853); the category is the number of atoms of the prompt."""
    _require_keys(rows, ("prompt", "atom_count", "vqa_list", "skills"), f"{where}: line")
    examples = []
    for i, row in enumerate(rows):
        if len(row["vqa_list"]) != len(row["skills"]):
            counts = f"{len(row['vqa_list'])} questions and {len(row['skills'])} skills"
            raise UserError(f"{where}: line {i + 1} has {counts}; their numbers must be equal")
        asked = tuple(Question(str(q), str(a)) for q, a in row["vqa_list"])
        atoms = f"{row['atom_count']} atom{'s' * (row['atom_count'] != 1)}"
        examples.append(_example(str(i), row["prompt"], atoms, questions=asked))
    return examples


def _dsg(rows: list[dict[str, str]]) -> list[Example]:
    """Reads the questions of DSG (arXiv:2310.18235) and DPG-Bench, a row each."""
    return _grouped(rows, "item_id", "text", dsg_question)


def _tifa(rows: list[dict], where: str) -> list[Example]:
    """Reads the questions of TIFA (arXiv:2303.11897), an entry each."""
    keys = ("id", "caption", "question", "answer")
    _require_keys(rows, keys, f"{where}: entry")
    return _grouped(rows, "id", "caption", tifa_question)


def _grouped(
    rows: list[dict], key: str, caption: str, question: Callable[[dict, list[dict]], Question]
) -> list[Example]:
    """Joins the questions of each prompt; the start of its id, as in coco_301091, is a category."""
    prompts: dict[str, list[dict]] = {}
    for row in rows:
        prompts.setdefault(str(row[key]), []).append(row)
    return [
        _example(
            name,
            found[0][caption],
            re.sub(r"[_\d]+$", "", name),
            questions=tuple(question(row, found) for row in found),
        )
        for name, found in prompts.items()
    ]


def _example(name: str, caption: str, category: str = "", **more: Any) -> Example:
    return {"id": name, "caption": caption, "category": category, **more}


def with_questions(suite: Suite, path: Path) -> Suite:
    """Adds the questions of a file (dsg, tifa or geneval2) to prompts of the same id or caption.

    Raises:
      UserError: the file has no questions, or none for a prompt.
    """
    where, found = f"--questions={path}", read(path, flag="questions")
    asked = {e["caption"]: e["questions"] for e in found.examples if "questions" in e}
    asked |= {e["id"]: e["questions"] for e in found.examples if found.name in ("dsg", "tifa")}
    if not asked:
        raise UserError(f"{where} has no questions; allowed: the files of DSG, TIFA and GenEval 2")
    examples = [
        {**e, "questions": asked.get(e["id"]) or asked.get(e["caption"])} for e in suite.examples
    ]
    if missing := [e["caption"] for e in examples if not e["questions"]]:
        raise UserError(
            f"{where} has no questions for {len(missing)} of {len(examples)} prompts; the first is "
            f"{missing[0][:60]!r}"
        )
    record = suite.record | {"questions_sha256": found.record["file_sha256"]}
    return suite._replace(examples=examples, record=record)
