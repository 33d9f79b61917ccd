"""launch.status reads what a run records about itself, and survives damaged files."""

import json

import pytest

from launch import status

NOW = 1e9


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "config.json").write_text('{"num_steps": 100, "log_every": 10}')
    line = {"step": 50, "step_time": 2.0, "images_per_s": 4.0, "loss": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    return tmp_path


def write_state(workdir, **fields):
    values = {"state": "running", "step": 50, "host": "tpu7", "heartbeat": NOW - 5}
    (workdir / "state.json").write_text(json.dumps({**values, **fields}))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({}, "running (on tpu7)"),
        ({"heartbeat": NOW - 7200}, "silent for 2h00m: stopped or stuck (on tpu7)"),
        (
            {"heartbeat": NOW - 7200, "step": 0},
            "silent for 2h00m: starting, stopped or stuck (on tpu7)",
        ),
        ({"state": "finished"}, "done"),
        ({"state": "preempted"}, "stopped after saving"),
        ({"state": "failed", "reason": "RunError: no\n space"}, "failed: RunError: no space"),
    ],
)
def test_the_state_is_what_the_run_recorded(workdir, fields, text):
    write_state(workdir, **fields)
    assert status.summary(workdir, NOW)["state"].replace(", 1m40s left", "") == text


def test_the_state_alone_is_one_line(workdir, capsys):
    write_state(workdir, state="failed", reason="why")
    assert status.main([f"--workdir={workdir}", "--state"]) == 0
    assert capsys.readouterr().out == "failed: why\n"


def test_goodput_is_shown_by_part(workdir):
    seconds = {"steps": 7200.0, "lost_steps": 600.0, "compile": 0.4, "down": 1200.0}
    (workdir / "goodput.json").write_text(json.dumps({"seconds": seconds, "starts": [{}, {}]}))
    assert status.summary(workdir, NOW)["goodput"] == (
        "80.0% of 2h30m in 2 start(s): steps 2h00m, lost steps 10m00s, down 20m00s"
    )


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"seconds": 3}', '{"state": [], "step": {}}'])
def test_damaged_files_are_left_out(workdir, text):
    for name in ("state.json", "goodput.json"):
        (workdir / name).write_text(text)
    found = status.summary(workdir, NOW)
    assert "goodput" not in found and found["step"].startswith("50 of 100")
