"""A workdir in a bucket: checkpoints, files that grow and the lock, without renames or appends."""

import contextlib
import json
import threading

import jax.numpy as jnp
import numpy as np
import pytest
from conftest import load_config, shrink, train_run
from etils import epath
from fake_buckets import in_memory, serving

from imagen_jax import train
from imagen_jax.common.buckets import files_below, to_path
from imagen_jax.common.errors import DAMAGED, RunError, UserError
from imagen_jax.config import parse
from imagen_jax.runs import checksums, mirror, ownership, verification
from imagen_jax.runs import workdir as runs
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.sections import CheckpointConfig

IDENTITY = {"model.name": "unet"}


def state(step):
    return {"ema": {"w": jnp.arange(300.0) + step}, "step": jnp.int32(step)}


def save(workdir, *steps, **options):
    with contextlib.closing(Checkpoints(workdir, CheckpointConfig(**options))) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"examples": 8 * step}, IDENTITY)


def restore(workdir, config=None):
    with contextlib.closing(Checkpoints(workdir, config)) as checkpoints:
        found, position = checkpoints.restore(state(0), IDENTITY)
        return int(found["step"]), np.asarray(found["ema"]["w"]), position


def test_checkpoints_in_a_bucket_are_whole_or_not_there(tmp_path):
    with serving() as bucket:
        workdir = to_path(f"{bucket}/runs/a")
        save(workdir, 1, 2, 3, max_to_keep=2)
        names = {path.relative_to(workdir).parts[1] for path in files_below(workdir)}
        assert names == {"step_2", "step_3"}
        step, weights, position = restore(workdir)
        assert step == 3 and position == {"examples": 24}
        np.testing.assert_array_equal(weights, state(3)["ema"]["w"])
        # A save that was cut off has no commit file: it does not count, and is cleaned up.
        folder = workdir / runs.CHECKPOINTS / "step_3"
        (folder / checksums.COMMITTED).unlink()
        assert restore(workdir)[0] == 2 and folder.exists()
        assert [p.name for p, _ in verification.problems(workdir) if "step" in p.name] == ["step_2"]
        save(workdir, 4, max_to_keep=2)
        assert not folder.exists() and restore(workdir)[0] == 4
        # A damaged object is found; a run that trains sets the checkpoint aside.
        for path in files_below(workdir / runs.CHECKPOINTS / "step_4"):
            if "/d/" in str(path):
                path.write_bytes(path.read_bytes()[:-1] + b"?")
        problems = {p.name: problem for p, problem in verification.problems(workdir)}
        assert "has another checksum" in problems["step_4"] and not problems["step_2"]
        with contextlib.closing(Checkpoints(workdir)) as checkpoints:
            with pytest.raises(RunError, match="step_4 is damaged") as error:
                checkpoints.existing_step(4)
            assert error.value.code == DAMAGED
        assert restore(workdir, CheckpointConfig())[0] == 2
        damaged = files_below(workdir / runs.DAMAGED_CHECKPOINTS / "step_4")
        assert damaged and Checkpoints(workdir).steps() == [2]


def test_files_that_grow_are_uploaded_whole_and_go_on_after_a_kill():
    with in_memory() as bucket:
        workdir = epath.Path(f"{bucket}/run")
        first = mirror.Mirror(workdir, [runs.METRICS])
        (first.folder / runs.METRICS).write_text('{"step": 1}\n')
        assert not first.due() and not workdir.exists()
        (first.folder / "plugins").mkdir()
        (first.folder / "plugins" / "trace").write_text("x")
        first.upload()
        with (first.folder / runs.METRICS).open("a") as file:
            file.write('{"step": 2}\n')  # lost: the process is killed before the next upload
        second = mirror.Mirror(workdir, [runs.METRICS])
        with (second.folder / runs.METRICS).open("a") as file:
            file.write('{"step": 3}\n')
        second.close()
        assert [line["step"] for line in runs.read_metrics(workdir)] == [1, 3]
        assert (workdir / "plugins" / "trace").read_text() == "x"
        assert first.folder != second.folder and not second.folder.exists()


def test_a_local_workdir_has_no_mirror(tmp_path):
    local = mirror.Mirror(tmp_path, [runs.METRICS])
    assert local.folder == tmp_path and not local.due()
    local.close()
    assert tmp_path.exists()


@pytest.fixture
def quick(monkeypatch):
    for name, seconds in {
        "BEAT_S": 0.02,
        "POLL_S": 0.02,
        "SILENT_S": 0.3,
        "SETTLE_S": 0.05,
    }.items():
        monkeypatch.setattr(ownership, name, seconds)


@pytest.mark.parametrize("kind", [in_memory, serving])
def test_a_second_run_is_refused_while_the_first_lives(quick, kind):
    with kind() as bucket:
        workdir = epath.Path(f"{bucket}/run")
        with runs.locked(workdir):
            words = r"run is in use by process \d+ on "
            with pytest.raises(UserError, match=words) as error, runs.locked(workdir):
                raise AssertionError
            assert f"--workdir={workdir} " in str(error.value)
        assert not (workdir / runs.LOCK).exists()


def test_a_run_takes_the_place_of_a_dead_one_and_notices_if_it_loses_its_own(quick):
    with in_memory() as bucket:
        path = epath.Path(f"{bucket}/run/{runs.LOCK}")
        path.write_text(json.dumps({"holder": "process 1 on a", "token": "dead"}))
        lost = threading.Event()
        with ownership.owned(path, lost.set):
            assert json.loads(path.read_text())["token"] != "dead" and not lost.is_set()
            path.write_text(json.dumps({"holder": "process 2 on b", "token": "other"}))
            assert lost.wait(10)
        assert json.loads(path.read_text())["token"] == "other"  # not ours to delete


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        (
            "s3://bucket/run",
            r"--workdir is 's3://bucket/run'; it must be a folder.* or gs://BUCKET/FOLDER",
        ),
        ("gs://bucket/run", r"gs://bucket/run needs gcsfs; install it with: pip install gcsfs"),
    ],
)
def test_other_buckets_and_a_missing_package_are_refused(monkeypatch, workdir, words):
    from types import SimpleNamespace

    import fsspec

    def missing(scheme):
        raise ImportError(scheme)

    flags = {"config": "x.py", "workdir": workdir, "num_processes": 1, "coordinator": ""}
    monkeypatch.setattr(train, "FLAGS", SimpleNamespace(distributed=False, **flags))
    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=words):
        train.check_flags()


@pytest.mark.slow
def test_a_run_in_a_bucket_equals_one_on_a_disk(tiny_data, tmp_path):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    values.update(num_steps=4, log_every=1, eval_every=2, eval_batches=1, sample_every=4)
    values.update(checkpoint_every=2)
    config = parse(values)
    train_run(config, tmp_path)
    with serving() as bucket:
        workdir = to_path(f"{bucket}/runs/a")
        assert not train_run(config, workdir, stop=lambda step: step == 3)
        assert train_run(config, workdir, profiled=range(4, 5))
        here, there = (
            [(line["step"], line["loss"]) for line in runs.read_metrics(path) if "loss" in line]
            for path in (tmp_path, workdir)
        )
        assert here == there and len(here) == 4
        names = {path.relative_to(workdir).parts[0] for path in files_below(workdir)}
        wanted = {runs.CONFIG, runs.METRICS, runs.STATE, runs.CHECKPOINTS, runs.SAMPLES}
        assert names >= {*wanted, runs.PROFILE} and runs.LOCK not in names
        assert any(name.startswith("events.out") for name in names)
        assert not any(problem for _, problem in verification.problems(workdir))
        # tests/test_sample.py holds what sampling does; here it is enough that the run is found.
        from imagen_jax.pipeline import cascade

        assert cascade.load(str(workdir)).stages[0].step == 4
