"""launch.local starts and stops processes; launch.status sums up a run."""

import json
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from launch import local, status


def test_status_sums_up_a_run(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_steps": 1000, "log_every": 10}))
    rows = [
        {"step": 10, "loss": 0.5, "step_time": 0.5, "images_per_s": 64.0},
        {"step": 10, "eval_loss": 0.25},
        {"step": 20, "loss": 0.4, "step_time": 0.25, "images_per_s": 128.0, "mfu": 0.5},
    ]
    text = "".join(json.dumps(r) + "\n" for r in rows)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 3')
    for name in ("step_8", "step_16", "step_24.orbax-checkpoint-tmp"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    written = (tmp_path / "metrics.jsonl").stat().st_mtime
    seen = status.summary(tmp_path, written + 5)
    assert seen["step"] == "20 of 1,000 (2.0%), written 5s ago"
    assert seen["rate"] == "4 steps/s, 128 images/s, MFU 50.0%"
    assert seen["state"] == "running, 4m05s left"
    assert seen["eval loss"] == "0.2500 at step 10"
    assert seen["checkpoint"].startswith(f"{tmp_path}/checkpoints/step_16, ")
    assert seen["tensorboard"] == f"tensorboard --logdir={tmp_path}"
    assert status.summary(tmp_path, written + 3600)["state"].startswith("silent for 1h00m")


def test_status_without_a_run_is_a_one_line_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        status.main([f"--workdir={tmp_path}"])
    assert e.value.code == 2 and capsys.readouterr().err.startswith("error: --workdir=")


def start(*scripts):
    return [subprocess.Popen(["bash", "-c", s], start_new_session=True) for s in scripts]


@pytest.mark.parametrize("value", ["x", "0", "-1", "1.5"])
def test_local_refuses_a_bad_number_of_processes(value):
    command = [sys.executable, "-m", "launch.local", f"--num_processes={value}"]
    command += ["--", "--workdir=x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "--num_processes" in done.stderr and value in done.stderr


def test_local_stops_the_others_when_one_fails():
    running = start("sleep 0.3; exit 3", "sleep 60")
    assert local.wait(running) == 3
    assert running[1].returncode == -signal.SIGTERM


def test_local_kills_processes_that_ignore_sigterm(monkeypatch):
    monkeypatch.setattr(local, "GRACE", 0.3)
    running = start("sleep 0.3; kill -ABRT $$", "trap '' TERM; while true; do sleep 0.05; done")
    assert local.wait(running) == 128 + signal.SIGABRT
    assert running[1].returncode == -signal.SIGKILL


def test_local_lets_the_others_save_when_one_has_stopped():
    running = start(f"exit {local.STOPPED}", "trap 'exit 9' TERM; sleep 0.5; exit 75")
    assert local.wait(running) == local.STOPPED
    assert [p.returncode for p in running] == [75, 75]


def test_the_code_of_a_killed_process_comes_before_that_of_those_it_stopped():
    running = start("sleep 0.3; exit 75", "sleep 0.3; kill -KILL $$")
    for process in running:
        process.wait()
    assert local.wait(running) == 128 + signal.SIGKILL
