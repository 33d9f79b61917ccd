"""The text probe: its table, and accuracy with informative and uninformative features."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from benchmarks.text_probe import probe


def test_the_table_has_both_encoders():
    command = [sys.executable, "-m", "benchmarks.text_probe"]
    done = subprocess.run(
        [*command, "--train=96", "--test=32", "--steps=1,2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = done.stdout.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [
        "| byte-tiny-random",
        "| byte-tiny",
    ]
    assert all(row.count("%") == 4 for row in rows)


def test_the_probe_finds_only_what_the_features_contain():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 11, (240, 2))
    mask = np.ones((240, 3), bool)
    features = np.zeros((240, 3, 22), "f4")
    for i in range(2):
        features[np.arange(240), 1, 11 * i + labels[:, i]] = 5
    _, accuracy = probe((features, mask), labels, [1, 150], num_test=40)
    assert min(accuracy) > 0.95
    [chance] = probe((np.ones_like(features), mask), labels, [20], num_test=40)
    assert max(chance) < 0.4
