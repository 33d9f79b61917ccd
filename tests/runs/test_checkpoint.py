"""A restored checkpoint is what was saved, whatever happens to its files."""

import json
import os
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, load_config, shrink

from imagen_jax import verify
from imagen_jax.common.errors import DAMAGED, WORKDIR_FAILED, RunError, UserError
from imagen_jax.runs import checksums, verification
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.sections import CheckpointConfig
from launch import local

IDENTITY = {"model.name": "unet"}


def state(step):
    return {"ema": {"w": jnp.arange(300.0) + step}, "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    for step in (1, 2):
        checkpoints.save(step, state(step), {"examples": 8 * step}, IDENTITY)
    checkpoints.close()
    return workdir


def files(workdir):
    folder = workdir / "checkpoints" / "step_2"
    return sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())


def flip(path, index=None):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 if index is None else index] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def restored(workdir, config=None):
    checkpoints = Checkpoints(workdir, config)
    found, position = checkpoints.restore(state(0), IDENTITY)
    checkpoints.close()
    return int(found["step"]), np.asarray(found["ema"]["w"]), position, checkpoints.damaged


@pytest.mark.parametrize("harm", [flip, cut, lambda path: path.unlink()], ids=["flip", "cut", "rm"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_is_taken(
    saved, tmp_path, harm, caplog
):
    names = files(saved)
    assert len(names) > 10
    for number, name in enumerate(names):
        workdir = tmp_path / str(number)
        shutil.copytree(saved, workdir)
        harm(workdir / "checkpoints" / "step_2" / name)
        caplog.clear()
        with caplog.at_level("WARNING", logger="imagen_jax"):
            step, weights, position, damaged = restored(workdir)
        if damaged:
            assert name.as_posix() in caplog.text, name
        # Orbax never reads the mark that it has committed. Without checksums, a warning says so.
        harmless = name.name == "commit_success.txt" and len(name.parts) == 1
        unchecked = name.name == checksums.CHECKSUMS and harm not in (flip, cut)
        assert damaged == ([] if harmless or unchecked else [2]), name
        assert "has no checksums" in caplog.text or not unchecked
        np.testing.assert_array_equal(weights, np.arange(300.0) + step)
        assert step == (1 if damaged else 2) and position == {"examples": 8 * step}


def test_every_byte_of_the_position_is_checked(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / "step_2" / "position" / "metadata"
    for index in range(path.stat().st_size):
        flip(path, index)
        assert checksums.find_damage(path.parents[1]).startswith("position/metadata")
        flip(path, index)
    assert not checksums.find_damage(path.parents[1])


def test_training_moves_a_damaged_checkpoint_away_and_saves_the_step_again(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for _ in range(2):
        flip(tmp_path / "checkpoints" / "step_2" / "state" / "manifest.ocdbt")
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        assert checkpoints.newest_whole() == 1
        checkpoints.save(2, state(2), {"examples": 16}, IDENTITY)
        checkpoints.close()
        assert restored(tmp_path)[0] == 2
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["step_2", "step_2.1"]


def test_without_a_whole_checkpoint_nothing_is_loaded_and_training_does_not_start_over(
    saved, tmp_path
):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    for step in (1, 2):
        flip(tmp_path / "checkpoints" / f"step_{step}" / "state" / "_METADATA")
    for config in (None, CheckpointConfig()):
        with pytest.raises(RunError, match=r"step_1 is damaged: state/_METADATA .* no older") as e:
            Checkpoints(tmp_path, config).newest_whole()
        assert e.value.code == DAMAGED
    with pytest.raises(RunError, match="step_1 is damaged: state/_METADATA"):
        Checkpoints(tmp_path).existing_step(1)


def test_the_newest_those_at_an_interval_and_the_best_are_kept(tmp_path):
    config = CheckpointConfig(max_to_keep=1, keep_every=4, keep_best=2)
    checkpoints = Checkpoints(tmp_path, config)
    scores = {1: 0.5, 2: 0.1, 3: 0.4, 5: 0.2, 6: 0.3, 9: 0.0}  # none of step 4
    checkpoints.scores = {}
    for step in range(1, 8):
        checkpoints.save(step, state(step), {}, IDENTITY)
        checkpoints.wait()
        checkpoints.scores |= {step: scores[step]} if step in scores else {}
    checkpoints.close()
    assert checkpoints.steps() == [2, 4, 5, 7]


def test_a_checkpoint_of_an_earlier_version_without_checksums_is_read(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "step_2" / checksums.CHECKSUMS).unlink()
    assert restored(tmp_path)[0] == 2
    (tmp_path / "checkpoints" / "step_2" / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(RunError, match="step_2 cannot be read, and has no checksums"):
        restored(tmp_path)


def test_verify_finds_damage_in_snapshots(saved, tmp_path):
    snapshot = tmp_path / "snapshots" / "step_1"
    shutil.copytree(saved / "checkpoints" / "step_1", snapshot)
    assert dict(verification.problems(tmp_path))[snapshot] == ""
    cut(snapshot / "identity" / "metadata")
    assert "identity/metadata has " in dict(verification.problems(tmp_path))[snapshot]


def test_verify_lists_every_file_and_names_the_damage(saved, tmp_path, capsys, monkeypatch):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    config = shrink(load_config("demo", "unet"))
    values = {**config.to_dict(), "model": dict(config.model)}
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    monkeypatch.setattr(verify, "FLAGS", type("F", (), {"workdir": str(tmp_path)}))
    verify.main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("whole ") for line in lines)
    cut(tmp_path / "checkpoints" / "step_1" / "identity" / "metadata")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"ste\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl and 1 more damaged") as e:
        verify.main([])
    assert e.value.code == DAMAGED
    out = capsys.readouterr().out
    assert "metrics.jsonl: 1 damaged line(s), first line 2" in out
    assert "step_1: identity/metadata has " in out and out.count("whole ") == 2
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="holds no run"):
        verify.main([])


@pytest.mark.slow
def test_processes_share_the_check_and_agree_on_the_damage(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints" / "step_2"
    names = list(json.loads((folder / checksums.CHECKSUMS).read_text())["files"])
    flip(folder / names[1])  # in the share of process 1
    assert checksums.find_damage(folder, 0, 2) == "" != checksums.find_damage(folder, 1, 2)
    program = (
        "import sys, jax\n"
        "jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))\n"
        "from imagen_jax.sections import CheckpointConfig\n"
        "from imagen_jax.runs.checkpoint import Checkpoints\n"
        "checkpoints = Checkpoints(sys.argv[3], CheckpointConfig())\n"
        "print(checkpoints.newest_whole(), checkpoints.damaged)\n"
    )
    command = [sys.executable, "-c", program, f"localhost:{local.free_port()}"]
    env = {**os.environ, "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen(
            [*command, str(i), str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env, cwd=ROOT
        )
        for i in range(2)
    ]
    for process in running:
        assert process.communicate(timeout=300)[0].endswith("1 [2]\n")
    assert (tmp_path / "damaged" / "step_2").is_dir()


def test_the_line_of_a_failed_save_has_the_systems_reason(tmp_path):
    text = "RESOURCE_EXHAUSTED: Error writing 'a' in file 4: No space left on device"
    checkpoints = Checkpoints(tmp_path)
    with (
        pytest.raises(RunError, match=r"in \S+/checkpoints: No space left on device; once") as e,
        checkpoints._reporting(),
    ):
        raise ValueError(text + " [os_error_code='28']")
    assert e.value.code == WORKDIR_FAILED
