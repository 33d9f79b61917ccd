"""A billion records: opening and resuming take bounded time and memory."""

import json
import subprocess
import sys

from conftest import ROOT


def test_a_billion_records_are_read_in_bounded_memory():
    args = ["--windows=4096", "--batches=1", "--batch_size=64"]
    command = [sys.executable, "-m", "benchmarks.reading_scale", *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    start, resumed = map(json.loads, done.stdout.splitlines())
    assert start["records"] == 10**9 and resumed["position"] > 5 * 10**9
    for figures in (start, resumed):
        # An index of 8 bytes for each record alone would take 7,600 MiB.
        assert figures["mib"] < 300 and figures["peak_mib"] < 1536
        assert figures["seconds_to_first_batch"] < 30  # it takes 2 s; an array of this size, 60 s
