"""The parts of the time to the first step sum to the time since the process started."""

import re
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from imagen_jax.training.startup import Startup


def test_the_parts_sum_to_the_age_of_the_process():
    before = time.perf_counter()
    startup = Startup(age=100.0)
    startup.done("imports")
    time.sleep(0.02)
    startup.done("data opening")
    startup.done("imports")
    wall = time.perf_counter() - before
    assert list(startup.seconds) == ["imports", "data opening"]
    assert startup.seconds["data opening"] >= 0.02
    metrics = startup.metrics()
    assert metrics["startup/total"] == pytest.approx(100 + wall, abs=0.02)
    assert metrics["startup/imports"] + metrics["startup/data_opening"] == metrics["startup/total"]


def test_the_summary_leaves_out_parts_that_took_no_time():
    startup = Startup(age=2.0)
    for part in ("imports", "nothing"):
        startup.done(part)
    assert startup.summary() == "first step done after 2.0 s: imports 2.0"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="without /proc it is CPU time")
def test_the_age_of_a_process_counts_from_its_start():
    code = "import time; time.sleep(1); from imagen_jax.training.startup import process_age as age;"
    code += "print(age(), time.perf_counter())"
    before = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    wall = time.perf_counter() - before
    assert re.match(r"\d", done.stdout), done.stderr
    assert 1.0 < float(done.stdout.split()[0]) < wall + 0.02  # the age is in ticks of 0.01 s
