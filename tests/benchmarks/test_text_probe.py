"""The probe of text encoders runs, and finds what is in the features and nothing else."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from benchmarks.text_probe import probe


def test_both_encoders_are_in_the_table():
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


def test_only_what_is_in_the_features_is_found():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 11, (240, 2))
    mask = np.ones((240, 3), bool)
    told = np.zeros((240, 3, 22), "f4")
    for i in range(2):
        told[np.arange(240), 1, 11 * i + labels[:, i]] = 5
    _, found = probe((told, mask), labels, [1, 150], num_test=40)
    assert min(found) > 0.95
    [guessed] = probe((np.ones_like(told), mask), labels, [20], num_test=40)
    assert max(guessed) < 0.4
