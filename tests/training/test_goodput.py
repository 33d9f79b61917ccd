"""The parts of the goodput sum to the wall time, and repeated steps are not counted as useful."""

import json

import pytest

from imagen_jax.training import goodput
from imagen_jax.training.goodput import Goodput
from imagen_jax.training.startup import Startup


class Clock:
    """Replaces `time` in a module; both of its clocks run only when told to."""

    def __init__(self, now=1e9):
        self.now = now

    def time(self):
        return self.now

    def perf_counter(self):
        return self.now - 9e8


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def begin(workdir, clock, step, **startup):
    """A start whose startup took these seconds."""
    parts = Startup()
    parts.seconds = {name.replace("_", " "): float(s) for name, s in startup.items()}
    clock.now += sum(startup.values())
    counter = Goodput(workdir, parts, step)
    counter.begin()
    return counter


def steps(counter, clock, first, last, seconds):
    for step in range(first, last + 1):
        clock.now += seconds
        counter.beat(step)


def saved(workdir):
    return json.loads((workdir / "goodput.json").read_text())["seconds"]


def test_the_parts_sum_to_the_wall_time_over_a_kill_and_the_lost_steps_are_known(tmp_path, clock):
    first = clock.now
    counter = begin(tmp_path, clock, 0, imports=5, compile=30, first_batch=2, first_step=1)
    steps(counter, clock, 2, 20, 1)
    with counter.spending("checkpoints"):
        clock.now += 4
    with counter.spending("evaluation"):
        clock.now += 6
    steps(counter, clock, 21, 60, 1)  # heartbeats at most 30 s apart
    written = json.loads((tmp_path / "goodput.json").read_text())["starts"][-1]
    assert 30 <= written["step"] <= 60
    clock.now += 100  # killed, and down

    counter = begin(tmp_path, clock, 20, imports=5, compile=3, restore=2, first_step=1)
    steps(counter, clock, 22, 50, 1)
    counter.close()
    found = saved(tmp_path)
    assert sum(found.values()) == pytest.approx(clock.now - first, rel=1e-9)
    assert {k: found[k] for k in ("compile", "data", "startup", "evaluation")} == {
        "compile": 33, "data": 2, "startup": 10, "evaluation": 6
    }  # fmt: skip
    assert found["checkpoints"] == 6
    assert found["steps"] == pytest.approx(50, abs=1e-6)
    assert found["lost_steps"] == pytest.approx(written["step"] - 20, abs=1e-6)
    unknown = 60 - written["step"]  # steps after the last heartbeat
    assert found["down"] == pytest.approx(100 + unknown, abs=1e-6)
    assert counter.metrics()["goodput"] == pytest.approx(50 / (clock.now - first))


def test_a_return_to_a_checkpoint_loses_the_steps_after_it_also_those_of_earlier_starts(
    tmp_path, clock
):
    counter = begin(tmp_path, clock, 0, first_step=1)
    steps(counter, clock, 2, 10, 1)
    counter.close()
    counter = begin(tmp_path, clock, 10, first_step=1)
    steps(counter, clock, 12, 16, 1)
    counter.rewind(6)
    steps(counter, clock, 7, 8, 1)
    counter.close()
    found = saved(tmp_path)
    assert found["lost_steps"] == pytest.approx(10) and found["steps"] == pytest.approx(8)
    assert found["down"] == 0


def test_a_clock_that_jumps_back_and_a_damaged_file_do_not_end_the_run(tmp_path, clock, caplog):
    counter = begin(tmp_path, clock, 0, first_step=1)
    counter.close()
    clock.now -= 5000
    begin(tmp_path, clock, 1, first_step=1).close()
    assert saved(tmp_path)["down"] == 0
    for damage in ("", "{}", '{"starts": [{}]}', '{"starts": {"began": 1}}', '{"starts": 3}'):
        (tmp_path / "goodput.json").write_text(damage)
        caplog.clear()
        begin(tmp_path, clock, 1, first_step=1).close()
        assert "goodput.json is damaged" in caplog.text, damage
        assert saved(tmp_path)["steps"] == 1


def test_nothing_is_counted_or_written_before_the_first_step(tmp_path, clock):
    counter = Goodput(tmp_path, Startup(), 0)
    with counter.spending("data"):
        clock.now += 3
    counter.beat(1)
    counter.close()
    assert counter.metrics() == {} and not (tmp_path / "goodput.json").exists()
