"""Runs are found by their config.json, and the default workdir is never a guess."""

import re
import subprocess
import sys

import pytest

from imagen_jax.common.errors import UserError
from imagen_jax.runs import checkpoint, workdir
from launch import status


def add_run(folder, name):
    (folder / name).mkdir(parents=True)
    (folder / name / workdir.CONFIG).write_text("{}")
    return folder / name


def test_the_only_run_is_the_default(tmp_path):
    run = add_run(tmp_path, "demo")
    (tmp_path / "notes").mkdir()
    assert workdir.only_run(tmp_path) == run


def test_without_a_run_the_error_names_the_command(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match=r"has no run; train one with: python -m imagen_jax"):
            workdir.only_run(folder)


def test_several_runs_are_listed(tmp_path):
    runs = [add_run(tmp_path, name) for name in ("b", "a")]
    with pytest.raises(UserError, match=re.escape(f"choose one of: {runs[1]}, {runs[0]}")):
        workdir.only_run(tmp_path)


def test_a_missing_run_is_an_error_and_creates_nothing(tmp_path):
    for read in (workdir.read_config, checkpoint.newest_step):
        with pytest.raises(UserError, match=r"holds no run: config\.json is missing"):
            read(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_reading_checkpoints_changes_nothing_on_disk(tmp_path):
    """A run that is training may be saving: Orbax writes to a temporary folder, then renames it."""
    run = add_run(tmp_path, "demo")
    with pytest.raises(UserError, match=f"no checkpoint in {run}"):
        checkpoint.newest_step(run)
    assert [path.name for path in run.iterdir()] == [workdir.CONFIG]
    saving = run / workdir.CHECKPOINTS / "step_5.orbax-checkpoint-tmp"
    saving.mkdir(parents=True)
    with pytest.raises(UserError, match=f"no checkpoint in {run}"):
        checkpoint.newest_step(run)
    assert saving.exists()


def test_a_metrics_line_that_is_cut_off_is_left_out(tmp_path):
    assert workdir.read_metrics(tmp_path) == []
    (tmp_path / workdir.METRICS).write_text('{"step": 1}\n{"step": 2}\n{"ste')
    assert [line["step"] for line in workdir.read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "damage", [b'{"step": 1, "lo\n', b"\n", b"\0" * 40 + b"\n", b"[1]\n", b"\xff{}\n", b"{}\n"]
)
def test_damaged_metrics_lines_are_left_out_and_reported(tmp_path, damage, caplog):
    (tmp_path / workdir.METRICS).write_bytes(b'{"step": 1}\n' + damage + b'{"step": 2}\n')
    with caplog.at_level("WARNING", logger="imagen_jax"):
        assert [line["step"] for line in workdir.read_metrics(tmp_path)] == [1, 2]
    assert "metrics.jsonl: left out 1 damaged line(s), the first is line 2" in caplog.text
    assert [line["step"] for line in status.read_lines(tmp_path / workdir.METRICS)] == [1, 2]


def test_a_config_that_is_cut_is_a_one_line_error(tmp_path, capsys):
    run = add_run(tmp_path, "demo")
    (run / workdir.CONFIG).write_text('{"seed": 1, "mod')
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        workdir.read_config(run)
    with pytest.raises(SystemExit):
        status.main([f"--workdir={run}"])
    assert "config.json is damaged" in capsys.readouterr().err


def test_a_second_run_in_a_workdir_is_refused_until_the_first_ends_or_dies(tmp_path):
    program = (
        "import pathlib, sys, time\n"
        "from imagen_jax.runs import workdir\n"
        f"with workdir.locked(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('locked', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as first:
        assert first.stdout.readline() == b"locked\n"
        words = rf"in use by process {first.pid} on "
        with pytest.raises(UserError, match=words) as e, workdir.locked(tmp_path):
            pass
        assert "\n" not in str(e.value)
        first.kill()
    with workdir.locked(tmp_path):
        pass
