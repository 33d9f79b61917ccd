"""Results are compared only under equal protocols, in pairs where prompts and seeds are equal."""

import copy
import json

import numpy as np
import pytest
from scipy import stats

from imagen_jax.common.errors import UserError
from imagen_jax.common.intervals import wilson
from imagen_jax.evaluation import protocol


def row(scores):
    low, high = wilson(sum(scores), len(scores))
    values = {"fully": float(np.mean(scores)), "low": low, "high": high}
    return {**values, "num": len(scores), "scores": scores}


@pytest.fixture
def result():
    stage = {"run": "a", "step": 10, "checksums_sha256": "x", "weights": "EMA, decay 0.99"}
    stage["sampling"] = {"name": "ddim", "guidance_weight": 2.0, "threshold": "dynamic"}
    return {
        "metric": "alignment",
        "protocol": {
            "prompts": {"suite": "drawbench", "sha256": "p", "num": 4, "ids": ["0", "1", "2", "3"]},
            "seeds": {"first": 0, "num": 4},
            "size": 64,
            "metric": {"check": "scenes"},
            "code": {"imagen_jax": "1"},
        },
        "columns": {
            "guidance 2": {
                "protocol": {"stages": [stage], "low_res": "drawn"},
                "table": {"all": row([1, 0, 0, 1]), "Text": row([1, 0])},
            },
            "true images": {"protocol": {}, "table": {"all": row([1, 1, 1, 1])}},
        },
    }


@pytest.fixture
def compare(result, tmp_path):
    def compare(change=lambda other: None):
        other = copy.deepcopy(result)
        change(other)
        paths = tmp_path / "a.json", tmp_path / "b.json"
        for path, value in zip(paths, (result, other), strict=True):
            path.write_text(json.dumps(value))
        return protocol.compare(*paths)

    return compare


def test_equal_prompts_and_seeds_are_compared_in_pairs(compare):
    def better(other):
        other["columns"]["guidance 2"]["table"]["all"] = row([1, 1, 1, 1])
        other["columns"]["guidance 2"]["protocol"]["stages"][0].update(run="b", step=20)
        other["protocol"]["code"]["imagen_jax"] = "2"

    lines = compare(better)
    assert len(lines) == 2 and lines[0].startswith("guidance 2, all: fully 0.5000 and 1.0000")
    assert "4 pairs" in lines[0] and "difference +0.5000" in lines[0]
    pairs = np.array([0, 1, 1, 0])
    low, high = stats.norm.interval(0.95, pairs.mean(), stats.sem(pairs))
    assert protocol.interval(row([1, 0, 0, 1]), row([1, 1, 1, 1]), True)[:2] == pytest.approx(
        (low, high), abs=1e-4
    )


def test_other_seeds_are_compared_unpaired_as_newcombe_does(compare):
    lines = compare(lambda other: other["protocol"]["seeds"].update(first=100))
    assert all("unpaired" in line for line in lines)
    # Newcombe (1998), table II, method 10: 56/70 and 48/80 differ by 0.2 (0.0524 to 0.3339).
    a, b = row([1] * 48 + [0] * 32), row([1] * 56 + [0] * 14)
    assert protocol.interval(a, b, False)[:2] == pytest.approx((0.0524, 0.3339), abs=1e-4)
    assert np.isnan(protocol.interval({"fid": 2.0}, {"fid": 1.0}, True)[0])


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("protocol.prompts.sha256", "q", r'prompts.sha256 ("p", "q")'),
        ("protocol.prompts.ids", ["0"], "prompts.ids (4 values, 1 values)"),
        ("protocol.size", 256, "size (64, 256)"),
        ("protocol.metric.network", "y", 'metric.network (null, "y")'),
        ("columns.guidance 2.protocol.low_res", "true", 'low_res ("drawn", "true")'),
        ("columns.guidance 2.protocol.stages.0.sampling.threshold", "none",
         'stages.0.sampling.threshold ("dynamic", "none")'),
        ("columns.guidance 2.protocol.stages.0.weights", "EMA", "stages.0.weights"),
        ("columns.guidance 2.protocol.stages", [], "stages"),
        ("metric", "fid", "b.json has fid"),
    ],
)  # fmt: skip
def test_another_protocol_is_refused_and_named(compare, path, value, words):
    def change(other):
        *keys, last = path.split(".")
        for key in keys:
            other = other[int(key)] if key.isdecimal() else other[key]
        other[last] = value

    with pytest.raises(UserError) as error:
        compare(change)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_columns_of_other_names_are_compared_if_they_are_the_only_ones(compare):
    def rename(other, more=()):
        column = other["columns"].pop("guidance 2")
        other["columns"] = dict.fromkeys(["losses", *more], column)

    assert compare(rename)[0].startswith("all: ")
    with pytest.raises(UserError, match="has losses, b; none is in both"):
        compare(lambda other: rename(other, ["b"]))
    with pytest.raises(UserError, match=r"is not a result of imagen_jax\.evaluate"):
        compare(lambda other: other.pop("columns"))
