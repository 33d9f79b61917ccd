"""The database of a study: trials, raters, which trials each rater gets, and their answers.

SQLite in WAL mode, so that raters, the results page and other processes read while one writes. Each
call opens its own connection; each answer is on the disk before the call returns.
"""

from __future__ import annotations

import contextlib
import json
import random
import secrets
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation.rating.protocols import QUESTIONS, RATERS

SCHEMA = """
CREATE TABLE study (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE trials (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, batch INTEGER NOT NULL, category TEXT NOT NULL,
    prompt TEXT NOT NULL, owners TEXT NOT NULL, sides TEXT NOT NULL, accepted TEXT NOT NULL
);
CREATE TABLE raters (id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE tasks (
    rater INTEGER NOT NULL REFERENCES raters, position INTEGER NOT NULL,
    trial INTEGER NOT NULL REFERENCES trials, swapped INTEGER NOT NULL,
    PRIMARY KEY (rater, position)
) WITHOUT ROWID;
CREATE TABLE answers (
    rater INTEGER NOT NULL REFERENCES raters, trial INTEGER NOT NULL REFERENCES trials,
    question TEXT NOT NULL, answer TEXT NOT NULL, seconds REAL NOT NULL, at TEXT NOT NULL,
    PRIMARY KEY (rater, trial, question)
) WITHOUT ROWID;
"""
WAIT_SECONDS = 60  # for another writer
# A side as the browser names it -> as it is stored, if the sides are swapped for the rater or not.
SWAPPED = {"left": "second", "right": "first"}
STRAIGHT = {"left": "first", "right": "second"}


class Rater(NamedTuple):
    """A rater: number, secret of the link, and how many of their trials are answered."""

    id: int
    token: str
    done: int
    total: int


class Store:
    """The database at a path."""

    def __init__(self, path: Path):
        self.path = path

    @contextlib.contextmanager
    def _connected(self, write: bool = False) -> Iterator[sqlite3.Connection]:
        connection = sqlite3.connect(self.path, timeout=WAIT_SECONDS, isolation_level=None)
        try:
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield connection
            connection.execute("COMMIT")
        finally:
            connection.close()  # undoes what was not committed

    def create(self, settings: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> None:
        """Creates the tables; each trial has the columns of SCHEMA, lists as such."""
        connection = sqlite3.connect(self.path)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.executescript(SCHEMA)
        connection.close()
        plain, lists = ("kind", "batch", "category", "prompt"), ("owners", "sides", "accepted")
        rows = [[*(t[n] for n in plain), *(json.dumps(t[n]) for n in lists)] for t in trials]
        with self._connected(write=True) as db:
            values = [(name, json.dumps(value)) for name, value in settings.items()]
            db.executemany("INSERT INTO study VALUES (?, ?)", values)
            db.executemany("INSERT INTO trials VALUES (NULL, ?, ?, ?, ?, ?, ?, ?)", rows)

    def settings(self) -> dict[str, Any]:
        """Returns the study's settings.

        Raises:
          UserError: the file is no database of a study.
        """
        try:
            with self._connected() as db:
                rows = db.execute("SELECT name, value FROM study").fetchall()
        except sqlite3.DatabaseError as e:
            raise UserError(f"{self.path} is not the database of a study ({e})") from e
        return {name: json.loads(value) for name, value in rows}

    def usual_raters(self, batches_each: int) -> int:
        """Returns how many raters the paper's number of ratings takes."""
        with self._connected() as db:
            kinds = db.execute("SELECT kind FROM trials GROUP BY batch").fetchall()
        return -(-sum(RATERS[kind] for (kind,) in kinds) // batches_each)

    def add_raters(self, total: int, batches_each: int, seed: int) -> None:
        """Adds raters until there are `total`; each gets the batches that most lack raters.

        The order of a rater's trials and the sides are shuffled by the seed and the rater's number,
        one kind of trial after the other.
        """
        with self._connected(write=True) as db:
            batches: dict[int, tuple[str, list[int]]] = {}
            for trial, batch, kind in db.execute("SELECT id, batch, kind FROM trials"):
                batches.setdefault(batch, (kind, []))[1].append(trial)
            counts = dict.fromkeys(batches, 0) | dict(
                db.execute(
                    "SELECT batch, COUNT(DISTINCT rater) FROM tasks "
                    "JOIN trials ON trials.id = trial GROUP BY batch"
                )
            )
            [(present,)] = db.execute("SELECT COUNT(*) FROM raters")
            for rater in range(present + 1, total + 1):
                chosen = sorted(batches, key=lambda b: (counts[b] / RATERS[batches[b][0]], b))
                chosen = chosen[:batches_each]
                rng = random.Random(f"{seed} {rater}")
                tasks = [(batches[batch][0], t) for batch in chosen for t in batches[batch][1]]
                rng.shuffle(tasks)
                tasks.sort(key=lambda task: task[0])  # stable: keeps the order within a kind
                token = secrets.token_urlsafe(12)
                db.execute("INSERT INTO raters VALUES (?, ?)", (rater, token))
                db.executemany(
                    "INSERT INTO tasks VALUES (?, ?, ?, ?)",
                    [(rater, i, trial, rng.randrange(2)) for i, (_, trial) in enumerate(tasks)],
                )
                for batch in chosen:
                    counts[batch] += 1

    def raters(self) -> list[Rater]:
        """Returns all raters in order."""
        with self._connected() as db:
            return [
                Rater(*row)
                for row in db.execute(
                    "SELECT raters.id, token, COUNT(DISTINCT answers.trial), "
                    "COUNT(DISTINCT position) FROM raters JOIN tasks ON tasks.rater = raters.id "
                    "LEFT JOIN answers ON answers.rater = raters.id "
                    "AND answers.trial = tasks.trial GROUP BY raters.id ORDER BY raters.id"
                )
            ]

    def rater_of(self, token: str) -> int | None:
        """Returns the number of the rater with this secret."""
        with self._connected() as db:
            row = db.execute("SELECT id FROM raters WHERE token = ?", (token,)).fetchone()
        return row and row[0]

    def tasks(self, rater: int) -> list[dict[str, Any]]:
        """Returns what a rater's browser may know: kind, prompt, sides and answers so far."""
        with self._connected() as db:
            rows = db.execute(
                "SELECT trial, kind, prompt, sides, swapped FROM tasks "
                "JOIN trials ON trials.id = trial WHERE rater = ? ORDER BY position",
                (rater,),
            ).fetchall()
            given: dict[int, dict[str, str]] = {}
            answers = "SELECT trial, question, answer FROM answers WHERE rater = ?"
            for trial, question, answer in db.execute(answers, (rater,)):
                given.setdefault(trial, {})[question] = answer
        tasks = []
        for trial, kind, prompt, sides, swapped in rows:
            shown = json.loads(sides)
            back = {stored: side for side, stored in (SWAPPED if swapped else STRAIGHT).items()}
            answers = {q: back.get(a, a) for q, a in given.get(trial, {}).items()}
            sides = shown[::-1] if swapped else shown
            tasks.append({"kind": kind, "prompt": prompt, "sides": sides, "answers": answers})
        return tasks

    def answer(self, rater: int, position: int, answers: Mapping[str, str], seconds: float) -> None:
        """Stores a rater's answers to one trial, in place of earlier ones.

        Args:
          position: of the trial, in the rater's order.
          answers: question -> answer, as the browser names them, to all questions of the trial.

        Raises:
          UserError: there is no such trial, or answers lack one or have an unknown one.
        """
        with self._connected(write=True) as db:
            task = db.execute(
                "SELECT trial, kind, swapped FROM tasks JOIN trials ON trials.id = trial "
                "WHERE rater = ? AND position = ?",
                (rater, position),
            ).fetchone()
            if task is None:
                raise UserError(f"position is {position}; there is no such trial")
            trial, kind, swapped = task
            allowed = {q.name: q.answers for q in QUESTIONS[kind]}
            if answers.keys() != allowed.keys():
                raise UserError(f"answers must be to {', '.join(allowed)}")
            sides = SWAPPED if swapped else STRAIGHT
            for question, answer in answers.items():
                if answer not in allowed[question]:
                    options = ", ".join(allowed[question])
                    raise UserError(f"{question} is {answer[:20]!r}; allowed: {options}")
                db.execute(
                    "INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?, datetime('now'))",
                    (rater, trial, question, sides.get(answer, answer), seconds),
                )

    def ratings(self) -> list[dict[str, Any]]:
        """Returns every answer with its trial: owners and accepted are lists, no pictures."""
        names = "rater trial batch kind category prompt owners accepted swapped question answer"
        names = [*names.split(), "seconds", "at"]
        with self._connected() as db:
            rows = db.execute(
                "SELECT a.rater, a.trial, batch, kind, category, prompt, owners, accepted, "
                "swapped, question, answer, seconds, at FROM answers a "
                "JOIN trials ON trials.id = a.trial "
                "JOIN tasks ON tasks.rater = a.rater AND tasks.trial = a.trial "
                "ORDER BY a.rater, a.trial, question"
            ).fetchall()
        found = [dict(zip(names, row, strict=True)) for row in rows]
        for rating in found:
            rating["owners"] = json.loads(rating["owners"])
            rating["accepted"] = json.loads(rating["accepted"])
        return found
