"""Sweeps: values are checked, points are named, and the table and pictures have all of them."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from imagen_jax.common.errors import UserError
from imagen_jax.evaluation import alignment, sweep
from imagen_jax.evaluation.metric import Metric


def test_points_are_the_product_and_their_names_say_what_differs():
    settings = sweep.parse(["guidance:1,2.50", "threshold:none,dynamic", "steps:8", "ema:kept,.05"])
    names = [sweep.name_of(p, settings) for p in sweep.points(settings)]
    assert len(names) == len(set(names)) == 8
    assert names[0] == "guidance 1, threshold none, ema kept".replace("ema", "EMA")
    assert names[-1] == "guidance 2.5, threshold dynamic, EMA 0.05"
    assert sweep.points(settings)[0]["steps"] == "8"
    [point] = sweep.points(alone := sweep.parse(["guidance:1.35/8"]))
    assert sweep.name_of(point, alone) == "guidance 1.35/8"
    assert [sweep.name_of(p, {}) for p in sweep.points({})] == ["config"]


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        (["guidance"], "--sweep is 'guidance'; allowed: NAME:VALUE,VALUE, NAME one of guidance"),
        (["color:red"], "--sweep is 'color:red'; allowed"),
        (["guidance:1,much"], "--sweep=guidance is '1,much'; allowed: numbers from 0 up"),
        (["guidance:-1"], "--sweep=guidance is '-1'; allowed: numbers from 0 up"),
        (["guidance:nan"], "--sweep=guidance is 'nan'"),
        (["guidance:1,1.0"], "a value is there twice"),
        (["threshold:none,"], "--sweep=threshold is 'none,'"),
        (["low_res:blurred"], "--sweep=low_res is 'blurred'; allowed: drawn, true"),
        (["steps:1", "steps:2"], "--sweep has steps twice"),
        (["ema:wide"], "allowed: numbers from 0 up, or kept"),
    ],
)
def test_bad_sweeps_are_one_line(specs, words):
    with pytest.raises(UserError) as error:
        sweep.parse(specs)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_table_has_a_row_per_point_and_the_pictures_a_line_per_threshold(tmp_path):
    settings = sweep.parse(["threshold:none,dynamic", "guidance:1,4,2"])
    points = {sweep.name_of(p, settings): p for p in sweep.points(settings)}
    rng = np.random.default_rng(0)
    check = lambda image, example: ([], [bool(image[0, 0, 0] > 99)] * 2)  # noqa: E731
    images = {name: rng.integers(0, 255, (6, 16, 16, 3)).astype(np.uint8) for name in points}
    brightness = Metric(
        "Bright?", "", lambda images, _: {"all": {"mean": float(np.mean(images)), "num": 6}}, str
    )
    metrics = {"alignment": alignment.metric(check), "brightness": brightness}
    results = {n: {c: m.measure(images[c], [{}] * 6) for c in points} for n, m in metrics.items()}
    sweep.write_table(tmp_path, points, results)
    rows = list(csv.DictReader((tmp_path / "sweep.csv").open()))
    assert [r["name"] for r in rows] == list(points)
    assert [(r["threshold"], r["guidance"]) for r in rows][1] == ("none", "4")
    for line in rows:
        total = results["alignment"][line["name"]]["all"]
        assert float(line["alignment.fully"]) == total["fully"]
        assert float(line["brightness.mean"]) == np.mean(images[line["name"]])
    assert json.loads((tmp_path / "sweep.json").read_text())["points"][0]["guidance"] == "1"

    parts = sweep.sections(tmp_path, points, metrics, results)
    assert "Sweep" in parts[0] and sum("data:image/png" in part for part in parts) == 1
    assert (tmp_path / "pareto_alignment_brightness.png").exists()
    alone = {"alignment": metrics["alignment"]}
    sweep.sections(tmp_path, points, alone, {"alignment": results["alignment"]})
    assert (tmp_path / "alignment_over_guidance.png").exists()

    path = sweep.write_grid(tmp_path, points, images, [f"prompt {i}" for i in range(6)])
    assert path.name == "grid_threshold_guidance.png"
    width, height = Image.open(path).size
    assert width == 2 * (128 + 8) + 8 and height > 4 * 3 * 128  # two thresholds, 4 x 3 rows
    some = dict(list(points.items())[:2])
    assert sweep.write_grid(tmp_path, some, images, ["a"] * 6) is None
    assert sweep.sections(tmp_path, dict(list(points.items())[:1]), metrics, results) == []
