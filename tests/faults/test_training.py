"""Faults within a run: losses that are not finite, a full disk, a workdir that goes away."""

import copy
import dataclasses
import errno
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, shrink

from imagen_jax.common.errors import DIVERGED, WORKDIR_FAILED, RunError
from imagen_jax.config import parse
from imagen_jax.runs import checksums
from imagen_jax.training import loop, periodic
from imagen_jax.training.experiment import build
from imagen_jax.training.step import all_finite


@pytest.fixture(scope="module")
def experiment(tiny_data):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    values.update(num_steps=8, log_every=1, eval_every=0, sample_every=0, checkpoint_every=2)
    values["guard"] = {"max_skips": 1}
    return build(parse(values))


class BadData:
    """A reader whose batches, counted from 1, give losses that are not finite if `bad(number)`."""

    def __init__(self, experiment, bad=lambda number: False):
        from data_pipelines.reading.reader import Reader

        self._reader, self._bad = Reader(experiment.config), bad
        self._size = experiment.config.batch_size
        self.take_bad_records = self._reader.take_bad_records

    def train_batches(self, position, *share):
        batches = self._reader.train_batches(position, *share)
        for number, batch in enumerate(batches, start=position // self._size + 1):
            if self._bad(number):
                batch = batch | {"text": np.full_like(batch["text"], np.nan)}
            yield batch


def train(experiment, workdir, bad=lambda number: False, stop=lambda step: False):
    return loop.train(experiment, BadData(experiment, bad), workdir, stop)


def metrics(workdir):
    """The lines without those of times."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    times = ("step_time", "images_per_s", "data_wait", "goodput", "checkpoint_delay")
    lines = [{k: v for k, v in m.items() if k not in times} for m in lines]
    return [m for m in lines if not any(key.startswith("startup/") for key in m)]


class Killed(Exception):
    pass


def train_killed(experiment, workdir, bad, step):
    """Trains, is killed when `step` comes for the second time, and resumes."""
    seen = []

    def stop(at):
        seen.append(at)
        if seen.count(step) == 2:
            raise Killed
        return False

    with pytest.raises(Killed):
        train(experiment, workdir, bad, stop)
    return train(experiment, workdir, bad)


def test_single_bad_batches_are_skipped_and_counted(experiment, tmp_path):
    assert train(experiment, tmp_path, lambda number: number in (3, 6))
    lines = {m["step"]: m for m in metrics(tmp_path)}
    assert {s: m.get("skipped_steps") for s, m in lines.items() if s in (2, 3, 6)} == {
        2: None, 3: 1, 6: 1
    }  # fmt: skip
    assert sorted(s for s, m in lines.items() if "loss" not in m) == [3, 6]
    # At step 6 a checkpoint is due, but the step was skipped.
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"step_2", "step_4", "step_8"}


@pytest.mark.slow
def test_after_a_bad_stretch_the_run_goes_on_with_other_data_and_a_killed_one_does_the_same(
    experiment, tmp_path
):
    def bad(number):
        return number in (5, 6)

    assert train(experiment, tmp_path / "whole", bad)
    lines = metrics(tmp_path / "whole")
    assert {"step": 5, "rollback/from_step": 6, "rollback/count": 1} in lines
    assert [m["step"] for m in lines if "loss" in m] == list(range(1, 9))
    assert not any("skipped_steps" in m for m in lines)

    repeated = loop.replay(experiment, BadData(experiment), tmp_path / "whole", 7)
    (line,) = [m for m in lines if m["step"] == 7]
    assert float(repeated["loss"]) == line["loss"] and not repeated["skipped"]

    # At its second step 5 it has gone back, and the next checkpoint is still to come.
    assert train_killed(experiment, tmp_path / "killed", bad, step=5)
    assert metrics(tmp_path / "killed") == lines


@pytest.mark.slow
def test_the_third_return_to_one_place_ends_the_run_and_its_checkpoint_stays(experiment, tmp_path):
    with pytest.raises(RunError, match=r"after 2 returns to step 4, .* config\.optimizer") as e:
        train(experiment, tmp_path, lambda number: number > 4)
    assert e.value.code == DIVERGED
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"step_2", "step_4"}


@pytest.mark.slow
def test_a_state_that_is_not_finite_is_not_saved(experiment, tmp_path, monkeypatch):
    state = experiment.init()
    assert all_finite(state)
    bad = jax.tree.map(lambda x: x, state)
    leaves, tree = jax.tree.flatten(bad)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    leaves[largest] = leaves[largest].at[(0,) * leaves[largest].ndim].set(jnp.inf)
    assert not all_finite(jax.tree.unflatten(tree, leaves))

    monkeypatch.setattr(periodic, "all_finite", lambda state: state.step != 4)
    with pytest.raises(RunError, match="diverged at step 4, after 2 returns to step 2"):
        train(experiment, tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_2"]


def test_checkpoints_by_the_clock_are_saved_at_log_lines(experiment, tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr(periodic, "time", clock)
    section = dataclasses.replace(experiment.config.checkpoint, every_s=10.0)
    changed = copy.copy(experiment)
    changed.config = dataclasses.replace(
        experiment.config, checkpoint=section, checkpoint_every=0, log_every=2
    )

    def stop(step):
        clock.now = 3.0 * step
        return False

    assert train(changed, tmp_path, stop=stop)
    saved = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert saved == {"step_4", "step_8"}


def test_a_save_that_fails_in_the_background_ends_the_run_at_once(
    experiment, tmp_path, monkeypatch
):
    def full(folder):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder))

    monkeypatch.setattr(checksums, "write", full)
    with pytest.raises(RunError) as e:
        train(experiment, tmp_path)
    message = str(e.value)
    assert "step 2 was not saved" in message and "No space left on device" in message
    assert e.value.code == WORKDIR_FAILED and "\n" not in message
    monkeypatch.undo()
    assert train(experiment, tmp_path)


def test_a_workdir_that_is_removed_ends_the_run_at_once(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(periodic, "WATCH_S", 0.0)

    def stop(step):
        if step == 3:
            shutil.rmtree(tmp_path / "run")
        assert step < 5
        return False

    with pytest.raises(RunError, match=r"has disappeared|No such file|NOT_FOUND") as e:
        train(experiment, tmp_path / "run", stop=stop)
    assert e.value.code == WORKDIR_FAILED and "\n" not in str(e.value)


@pytest.fixture(scope="module")
def sparse(experiment):
    """The experiment with a checkpoint and a line of metrics every 4 steps."""
    changed = copy.copy(experiment)
    changed.config = dataclasses.replace(experiment.config, checkpoint_every=4, log_every=4)
    return changed


@pytest.fixture(scope="module")
def alone(sparse, tmp_path_factory):
    """The metrics of a run that is not killed and saves no local checkpoints."""
    workdir = tmp_path_factory.mktemp("alone")
    assert train(sparse, workdir)
    return metrics(workdir)


def with_local(experiment, disk, every):
    changed = copy.copy(experiment)
    section = dataclasses.replace(
        experiment.config.checkpoint, local_dir=str(disk), local_every=every
    )
    changed.config = dataclasses.replace(experiment.config, checkpoint=section)
    return changed


def kill_at(step, seen=None):
    def stop(now):
        if seen is not None:
            seen.append(now)
        if now == step:
            raise Killed
        return False

    return stop


def damage(folder):
    """Flips a bit of the largest file of each checkpoint in a folder."""
    for checkpoint in [p for p in folder.rglob("step_*") if p.is_dir()]:
        path = max(checkpoint.rglob("*"), key=lambda p: p.is_file() and p.stat().st_size)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)


@pytest.mark.parametrize(
    ("damaged", "restored", "steps"),
    [
        ((), "local_dir", [7, 8]),
        (("disk",), "workdir", [5, 6, 7, 8]),
        (("run/checkpoints",), "local_dir", [7, 8]),
    ],
)
def test_a_killed_run_resumes_from_the_newest_whole_checkpoint_local_or_not(
    sparse, alone, tmp_path, caplog, damaged, restored, steps
):
    local, seen = with_local(sparse, tmp_path / "disk", every=3), []
    with pytest.raises(Killed):
        train(local, tmp_path / "run", stop=kill_at(7))
    for folder in damaged:
        damage(tmp_path / folder)
    caplog.clear()
    assert train(local, tmp_path / "run", stop=kill_at(None, seen))
    assert seen == steps and metrics(tmp_path / "run") == alone
    # The copies of steps 4 and 6.
    assert caplog.text.count(" left out: ") == (2 if restored == "workdir" else 0)
    starts = (tmp_path / "run" / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["restored"] for line in starts] == ["", restored]
    assert not any((tmp_path / "disk").iterdir()), "a finished run removes its copies"


@pytest.mark.slow
def test_with_local_checkpoints_a_diverging_run_goes_back_as_without(experiment, tmp_path):
    def bad(number):
        return number in (6, 7, 11, 12)  # also in the data after the first return

    changed = copy.copy(experiment)
    changed.config = dataclasses.replace(experiment.config, checkpoint_every=4)
    local = with_local(changed, tmp_path / "disk", every=1)
    for name, one in (("without", changed), ("with", local)):
        assert train(one, tmp_path / name, bad)
    lines = metrics(tmp_path / "without")
    assert {"step": 5, "rollback/from_step": 8, "rollback/count": 2} in lines
    assert metrics(tmp_path / "with") == lines

    # At its second step 6 it has gone back once.
    assert train_killed(local, tmp_path / "killed", bad, step=6)
    assert metrics(tmp_path / "killed") == lines
