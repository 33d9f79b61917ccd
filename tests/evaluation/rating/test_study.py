"""Studies: the plan of both protocols, blind copies, who gets what, and answers that stay."""

import collections
import threading

import numpy as np
import pytest
from PIL import Image
from ratings import (
    CATEGORIES,
    PROMPTS,
    answer_all,
    coco_study,
    drawbench_study,
    owners_shown,
    prefers,
    write_categories,
    write_references,
    write_samples,
)

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation.rating import protocols, study
from imagen_jax.evaluation.rating.store import Store


def test_drawbench_shows_eight_samples_a_side_of_one_category(tmp_path):
    store = drawbench_study(tmp_path, raters=4, batches=1)
    for rater, category in ((1, "Colors"), (2, "Text"), (3, "Colors"), (4, "Text")):
        tasks = store.tasks(rater)
        assert sorted(t["prompt"] for t in tasks) == sorted(CATEGORIES[category])
        assert all([len(side) for side in t["sides"]] == [8, 8] for t in tasks)
    assert store.usual_raters(1) == 2 * 25


def test_sides_and_order_are_shuffled_for_each_rater(tmp_path):
    store = drawbench_study(tmp_path, raters=40)
    orders = collections.Counter(tuple(t["prompt"] for t in store.tasks(r)) for r in range(1, 41))
    assert len(orders) > 10
    left = [owners[0] for shown in owners_shown(store).values() for owners, _, _ in shown]
    assert 0.35 < left.count("secretly-good") / len(left) < 0.65


def test_eight_of_more_samples_are_drawn_without_repeats(tmp_path):
    models = {n: write_samples(tmp_path / n, num=12) for n in ("x", "y")}
    store = study.create(tmp_path / "study", "drawbench", models)
    store.add_raters(1, 1, 0)
    shown = [name for task in store.tasks(1) for side in task["sides"] for name in side]
    assert len(set(shown)) == len(shown) == 2 * 8 * len(PROMPTS)


def test_three_models_meet_in_pairs(tmp_path):
    store = drawbench_study(tmp_path, raters=1, batches=6, names=("x", "y", "z"))
    pairs = collections.Counter(tuple(sorted(owners)) for owners, _, _ in owners_shown(store)[1])
    assert pairs == {("x", "y"): 4, ("x", "z"): 4, ("y", "z"): 4}


def test_coco_has_controls_and_both_questions(tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "BATCH", 6)
    store = coco_study(
        tmp_path, raters=1, batches=6, num_captions=12
    )  # 2 of photorealism, 4 of similarity
    kinds = [t["kind"] for t in store.tasks(1)]
    assert kinds == sorted(kinds)  # one kind after the other
    assert collections.Counter(kinds) == {"photorealism": 12 + 4, "similarity": 24 + 8}
    shown = owners_shown(store)[1]
    controls = [(owners, accepted) for owners, accepted, _ in shown if accepted]
    assert len(controls) == 4 + 8
    assert sum(accepted == ["no"] for _, accepted in controls) == 4
    measured = collections.Counter(o[0] for o, accepted, _ in shown[16:] if not accepted)
    assert measured == {"secret": 12, "reference": 12}
    # Controls are interleaved.
    places = [i for i, (_, accepted, _) in enumerate(shown[16:]) if accepted]
    assert min(places) < 12 < max(places)


def test_a_foreign_caption_shares_no_word_with_the_right_one(tmp_path):
    store = coco_study(tmp_path, raters=1, batches=2)
    trials = "SELECT sides, prompt FROM trials WHERE kind = 'similarity' AND owners LIKE '%ref%'"
    with store._connected() as db:
        own = dict(db.execute(f"{trials} AND accepted NOT LIKE '%no%'"))
        foreign = db.execute(f"{trials} AND accepted LIKE '%no%'").fetchall()
    assert foreign
    for sides, prompt in foreign:
        assert not protocols.words(prompt) & protocols.words(own[sides])


def test_no_people():
    captions = ["A man rides.", "two Women", "a mandolin", "a dog", "children play"]
    assert protocols.without_people(captions) == {"a mandolin", "a dog", "children play"}


def test_copies_are_blind_and_references_get_the_size_of_samples(tmp_path):
    coco_study(tmp_path)
    files = sorted((tmp_path / "study" / "pictures").iterdir())
    assert all(f.suffix == ".webp" and len(f.stem) == 16 for f in files)
    for file in files:
        with Image.open(file) as image:
            assert image.size == (16, 16) and not {"request", "exif"} & image.info.keys()
        assert b"secret" not in file.read_bytes()


def test_small_pictures_are_copied_exactly_and_large_ones_twice(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "small.png")
    Image.new("RGB", (700, 700)).save(tmp_path / "large.png")
    study._write(protocols.Picture(tmp_path / "small.png"), tmp_path / "s")
    study._write(protocols.Picture(tmp_path / "large.png"), tmp_path / "l")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "s.webp")), pixels)
    assert Image.open(tmp_path / "l.webp").size == (320, 320)
    assert Image.open(tmp_path / "l-full.webp").size == (700, 700)


def test_scrambling_moves_tiles():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    moved = np.asarray(study.scrambled(Image.fromarray(pixels)))
    assert moved.shape == pixels.shape and (moved != pixels).mean() > 0.8
    np.testing.assert_array_equal(np.sort(moved.ravel()), np.sort(pixels.ravel()))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda a, b, t: {"samples": 9}, "a has 8 samples of 'a red cube'; --samples is 9"),
        (lambda a, b, t: (b / "00009.png").write_text("x") and {}, "00009.png is not a readable"),
        (
            lambda a, b, t: {"categories": _text(t / "c.csv", "a red cube,Colors\nx,Empty\n")},
            "no category is given for the prompt 'a blue cup'",
        ),
        (
            lambda a, b, t: {
                "categories": _text(
                    t / "c.csv", write_categories(t / "d.csv").read_text() + "\nx,Empty\n"
                )
            },
            "has no prompt of the category 'Empty'",
        ),
        (lambda a, b, t: _text(t / "study", "a file") and {}, "exists and holds no study"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, make, words):
    models = {n: write_samples(tmp_path / n) for n in ("a", "b")}
    options = make(models["a"], models["b"], tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError) as e:
        study.create(tmp_path / "study", "drawbench", models, **options)
    assert words in str(e.value) and "\n" not in str(e.value)
    assert sorted(tmp_path.iterdir()) == before


def _text(path, text):
    path.write_text(text)
    return path


def test_coco_needs_references_of_all_prompts(tmp_path):
    models = {"a": write_samples(tmp_path / "a")}
    with pytest.raises(UserError, match="needs --references=FOLDER"):
        study.create(tmp_path / "study", "coco", models)
    real = write_references(tmp_path / "real", PROMPTS[:2])
    with pytest.raises(UserError, match="has no image for 2 prompts"):
        study.create(tmp_path / "study", "coco", models, references=real)
    with pytest.raises(UserError, match="compares two models or more"):
        study.create(tmp_path / "study", "drawbench", models)


def test_more_raters_keep_the_links_of_the_first(tmp_path):
    store = drawbench_study(tmp_path, raters=3)
    before = store.raters()
    store.add_raters(5, 1, 0)
    store.add_raters(2, 1, 0)  # fewer than there are: no change
    after = store.raters()
    assert after[:3] == before and len(after) == 5
    assert len({r.token for r in after}) == 5
    assert [r.total for r in after] == [4, 4, 4, 2, 2]


def test_an_answer_replaces_the_earlier_one_and_survives_a_restart(tmp_path):
    store = drawbench_study(tmp_path)
    given = {"quality": "left", "alignment": "same"}
    store.answer(1, 0, {"quality": "right", "alignment": "right"}, 1)
    store.answer(1, 0, given, 2)
    again = Store(store.path)
    assert again.tasks(1)[0]["answers"] == given
    assert again.tasks(2)[0]["answers"] == {}
    assert [(r.done, r.total) for r in again.raters()] == [(1, 4), (0, 4)]


@pytest.mark.parametrize(
    ("position", "answers", "words"),
    [
        (4, {"quality": "left", "alignment": "left"}, "position is 4; there is no such trial"),
        (0, {"quality": "left"}, "answers must be to quality, alignment"),
        (0, {"quality": "left", "alignment": "first"}, "alignment is 'first'; allowed: left"),
    ],
)
def test_bad_answers_change_nothing(tmp_path, position, answers, words):
    store = drawbench_study(tmp_path)
    with pytest.raises(UserError, match=words):
        store.answer(1, position, answers, 1)
    assert not store.ratings()


def test_eight_raters_at_once_lose_no_answer(tmp_path):
    store = drawbench_study(tmp_path, raters=8)
    threads = [
        threading.Thread(target=answer_all, args=(Store(store.path), r, prefers("secretly-good")))
        for r in range(1, 9)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ratings = store.ratings()
    assert len(ratings) == 8 * 4 * 2
    names = {"first": 0, "second": 1}
    assert {r["owners"][names[r["answer"]]] for r in ratings} == {"secretly-good"}


def test_a_foreign_database_is_refused(tmp_path):
    (tmp_path / study.DATABASE).write_text("not a database, but long enough to be read as one")
    with pytest.raises(UserError, match="is not the database of a study"):
        study.open_store(tmp_path)
