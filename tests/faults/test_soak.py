"""The short form of tests/faults/soak.py, and the goodput of a run that is killed."""

import json
import time

import pytest
from faults import soak


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [False, True])
def test_a_run_that_is_killed_three_times_equals_one_left_alone(tmp_path, in_memory):
    assert soak.soak(3, num_steps=20, in_memory=in_memory, seed=1, folder=tmp_path) == []


@pytest.mark.slow
def test_the_goodput_of_a_killed_run_sums_to_its_wall_time(tmp_path):
    run = soak.Run(soak.make_config(tmp_path, 30), tmp_path / "run")
    begin = time.time()
    [process] = run.start()
    while run.num_read() < 14:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(3)
    run.finish()
    path = tmp_path / "run" / "goodput.json"
    wall, seconds = path.stat().st_mtime - begin, json.loads(path.read_text())["seconds"]
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert seconds["down"] > 3 and min(seconds["steps"], seconds["compile"]) > 0
    assert seconds["lost_steps"] > 0
