"""Results: preferences by category, controls, the subset without people, CSV."""

import csv
import math

import pytest
from ratings import answer_all, coco_study, drawbench_study, prefers

from imagen_jax.evaluation.rating import results


def table(found, title):
    return next(t for t in found.tables if t.title.startswith(title))


def test_drawbench(tmp_path):
    store = drawbench_study(tmp_path, raters=6)
    for rater in range(1, 6):
        answer_all(store, rater, prefers("secretly-good"))
    found = results.analyze(store)
    quality = table(found, "Image quality: secretly-good against secretly-bad")
    assert quality.columns == ["prefer secretly-good", "indifferent", "prefer secretly-bad"]
    assert [row.subset for row in quality.rows] == ["all prompts", "Colors", "Text"]
    for row in quality.rows:
        assert [rate.value for rate in row.rates] == [1, 0, 0] and row.raters == 5
        assert row.rates[0].low < 1 and row.rates[2].high > 0
    text, page = results.to_text(found), results.to_html(found)
    assert "5 of 6 raters have started, 5 have finished." in text
    assert "prefer secretly-good" in text and "Image-text alignment" in page
    assert "raters to go for ±5%" in page


def test_no_answers_yet(tmp_path):
    found = results.analyze(drawbench_study(tmp_path))
    assert not found.tables and "0 of 2 raters have started" in results.to_text(found)
    assert "</html>" in results.to_html(found)


def test_one_rater_has_no_interval(tmp_path):
    store = drawbench_study(tmp_path)
    answer_all(store, 1, prefers("secretly-bad"))
    row = table(results.analyze(store), "Image quality").rows[0]
    assert row.rates[2].value == 1 and math.isnan(row.rates[2].low) and math.isnan(row.needed)
    assert "100%" in results.to_text(results.analyze(store))


def test_three_models_get_strengths(tmp_path):
    store = drawbench_study(tmp_path, raters=4, batches=6, names=("x", "y", "z"))
    order = "xyz"
    for rater in range(1, 5):
        answer_all(
            store, rater, lambda q, owners, *_: "left" if owners[0] == min(owners) else "right"
        )
    found = results.analyze(store)
    strengths = found.strengths["quality"].value
    assert list(strengths) == sorted(strengths, reverse=True) and len(strengths) == len(order)
    assert "Bradley-Terry" in results.to_text(found)


def careless(question, owners, accepted, swapped):
    return "left" if len(owners) == 2 else "yes"


def test_coco_drops_raters_who_fail_controls(tmp_path):
    store = coco_study(tmp_path, raters=3, batches=3)
    for rater in (1, 2):
        answer_all(store, rater, prefers("secret"))
    answer_all(store, 3, careless)
    found = results.analyze(store)
    assert [r.kept for r in found.raters] == [True, True, False]
    assert "1 are left out" in results.to_text(found)
    realism = table(found, "Photorealism: secret")
    assert realism.rows[0].rates[0].value == 1 and realism.rows[0].raters == 2
    assert [row.subset for row in realism.rows] == ["all prompts", "no people"]
    assert realism.rows[0].prompts == realism.rows[1].prompts + 1  # a man on a bench
    assert table(found, "Caption similarity: secret").rows[0].rates[0].value == 0.5
    assert table(found, "Caption similarity: reference").rows[0].rates[0].value == 1


def test_a_rater_of_coco_counts_after_a_control(tmp_path):
    store = coco_study(tmp_path, raters=1, batches=3)
    position = next(i for i, task in enumerate(store.tasks(1)) if task["kind"] == "photorealism")
    with store._connected(write=True) as db:  # the first trial is no control
        db.execute("UPDATE trials SET accepted = '[]'")
    store.answer(1, position, {"photorealism": "left"}, 1)
    assert not results.analyze(store).tables


def test_csv_names_the_preferred_model_and_judges_controls(tmp_path):
    store = coco_study(tmp_path, raters=1, batches=3)
    answer_all(store, 1, prefers("secret"))
    rows = list(csv.DictReader(results.to_csv(store.ratings()).splitlines()))
    assert len(rows) == sum(r.total for r in store.raters())
    assert {r["control"] for r in rows} == {"", "right"}
    measured = [r for r in rows if not r["control"] and r["kind"] == "photorealism"]
    assert {r["answer"] for r in measured} == {"secret"}
    assert {r["left"] for r in measured} == {"secret", "reference"}
    assert all({r["left"], r["right"]} == {"secret", "reference"} for r in measured)


def test_answers_do_not_depend_on_the_side(tmp_path):
    """Raters who always take the left side show no preference."""
    store = drawbench_study(tmp_path, raters=8)
    for rater in range(1, 9):
        answer_all(store, rater, careless)
    [first, same, second] = table(results.analyze(store), "Image quality").rows[0].rates
    assert same.value == 0 and first.value == pytest.approx(0.5, abs=0.25)
    assert first.low < 0.5 < first.high and second.low < 0.5 < second.high
