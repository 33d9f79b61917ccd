"""What a user does with a run works the same if the run is in a bucket, and its results too."""

import json

import exports
import jax
import numpy as np
import pytest
from conftest import FakeEncoder, load_config, shrink
from etils import epath
from fake_buckets import in_memory, serving
from saved_runs import save_run

from imagen_jax import evaluate
from imagen_jax import stage as stages
from imagen_jax.common import typed_config
from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import UserError
from imagen_jax.evaluation import protocol
from imagen_jax.runs import mirror, verification
from imagen_jax.runs import workdir as runs
from imagen_jax.stage import Stage
from launch import status


@pytest.fixture(scope="module")
def bucket():
    with serving() as path:
        yield path


@pytest.fixture(scope="module")
def run(bucket):
    """A run in the bucket with a checkpoint, metrics and a save that was cut off."""
    workdir = to_path(f"{bucket}/runs/a")
    save_run(shrink(load_config("demo", "unet")), workdir)
    line = {"step": 1, "step_time": 2.0, "images_per_s": 4.0, "loss": 0.5}
    (workdir / runs.METRICS).write_text(json.dumps(line) + "\n")
    (workdir / runs.CHECKPOINTS / "step_9" / "cut_off").write_text("x")
    return workdir


def test_status_reads_a_bucket_and_passes_over_unfinished_saves(run, capsys):
    assert status.main([f"--workdir={run}"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["workdir"] == str(run) and rows["step"].startswith("1 of ")
    assert rows["checkpoint"].startswith(f"{run}/checkpoints/step_1, ")
    assert rows["checkpoint"].endswith("s ago") and rows["samples"] == "none yet"


@pytest.mark.parametrize(
    ("workdir", "words"),
    [
        ("gs://bucket/no", "--workdir=gs://bucket/no has no run: config.json is missing"),
        ("s3://bucket/a", "--workdir is 's3://bucket/a'; it must be a folder or gs://BUCKET/FOLD"),
    ],
)
def test_status_refuses_other_paths_in_one_line(bucket, workdir, words, capsys):
    with pytest.raises(SystemExit) as error:
        status.main([f"--workdir={workdir}"])
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_the_config_of_a_run_in_a_bucket_is_a_config_file(run):
    name = f"{run}/{runs.CONFIG}"
    values = typed_config.load(name, ["num_steps=7"])
    assert values == {**json.loads((run / runs.CONFIG).read_text()), "num_steps": 7}
    assert typed_config.run_name(name) == "a"
    for wrong in (f"{run}/no.json", f"{run}/config.py"):
        with pytest.raises(UserError, match=r"--config is 'gs://.*no such config file"):
            typed_config.load(wrong)


def test_an_evaluation_is_written_beside_the_run_and_keeps_its_samples(run, monkeypatch, capsys):
    for module in ("imagen_jax.pipeline.cascade", "imagen_jax.text"):
        monkeypatch.setattr(f"{module}.load_encoder", lambda *args: FakeEncoder())
    out = run / runs.EVALUATION
    args = [run], {"guidance": ["1"]}
    evaluate.evaluate(*args, scenes=True, num=2, out=out)
    found = json.loads((out / "alignment.json").read_text())
    stage = found["columns"]["guidance 1"]["protocol"]["stages"][0]
    assert stage["run"] == "a" and len(stage["checksums_sha256"]) == 64
    page = run / runs.REPORT
    assert "Protocol of alignment" in page.read_text()
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2:] == [str(out / "samples_guidance_1.png"), str(page)]

    def draw_nothing(*args, **kwargs):
        raise AssertionError("the samples exist")

    monkeypatch.setattr(Stage, "sample", draw_nothing)
    other = run.parent / "elsewhere"
    evaluate.evaluate(*args, scenes=True, num=2, out=out)
    with pytest.raises(AssertionError, match="the samples exist"):
        evaluate.evaluate(*args, scenes=True, num=2, out=other)
    assert protocol.compare(out / "alignment.json", out / "alignment.json")
    assert not any(problem for _, problem in verification.problems(run))


def test_a_run_is_exported_from_a_bucket_into_a_bucket(run, bucket):
    out = f"{bucket}/models/a"
    with exports.defined_flags():
        exports.call(out, f"--workdir={run}")
        with pytest.raises(UserError, match=f"--out={out} is not empty; name a new folder"):
            exports.call(out, f"--workdir={run}")
    assert "0.5000" not in (to_path(out) / runs.CARD).read_text()
    assert not any(problem for _, problem in verification.problems(to_path(out)))
    expected, found = (stages.load(workdir)[1] for workdir in (run, out))
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(a, b)


def test_results_begin_with_those_of_an_interrupted_call():
    with in_memory() as bucket:
        out = epath.Path(f"{bucket}/out")
        with pytest.raises(KeyboardInterrupt), mirror.results(out, "out") as folder:
            (folder / "64").mkdir()
            (folder / "64" / "0.png").write_bytes(b"first")
            raise KeyboardInterrupt
        with mirror.results(out, "out") as folder:
            assert (folder / "64" / "0.png").read_bytes() == b"first"
            (folder / "grid.png").write_bytes(b"grid")
        assert not folder.exists() and (out / "grid.png").read_bytes() == b"grid"


def test_results_that_cannot_be_uploaded_stay_on_the_machine(tmp_path, monkeypatch):
    with in_memory() as bucket:
        monkeypatch.setattr(
            mirror.Mirror, "upload", lambda self: (_ for _ in ()).throw(OSError(5, "no access"))
        )
        out = epath.Path(f"{bucket}/out")
        words = r"--out=s3://.*: no access; the results are in (.*)"
        with pytest.raises(UserError, match=words), mirror.results(out, "out") as folder:
            (folder / "grid.png").write_bytes(b"grid")
        assert (folder / "grid.png").exists()
