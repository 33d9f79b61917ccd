"""The whole path: training writes its files, resumes exactly after a stop, and is evaluated."""

import contextlib
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from conftest import ROOT, load_config, shrink, train_run
from PIL import Image

from imagen_jax import evaluate, train
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.devices import processes
from imagen_jax.evaluation import protocol
from imagen_jax.pipeline import cascade
from imagen_jax.runs import checksums
from imagen_jax.runs.checkpoint import Checkpoints
from imagen_jax.runs.workdir import read_config
from imagen_jax.sections import GuardConfig
from imagen_jax.stage import load
from imagen_jax.training.experiment import build
from imagen_jax.training.guard import Guard
from imagen_jax.training.loop import FINISHED, run_loop
from imagen_jax.training.startup import Startup


class StopAt:
    """Requests a stop at a given step, as a preemption does."""

    def __init__(self, step=None):
        self.step = step

    def __call__(self, step):
        return step == self.step


@pytest.fixture(scope="module")
def config(tiny_data):
    values = shrink(load_config("demo", "unet")).to_dict()
    values["data"].update(dir=tiny_data, build=False)
    values.update(
        num_steps=6, log_every=1, eval_every=3, eval_batches=1, sample_every=3, checkpoint_every=4
    )
    values["ema"] = {"widths": (0.05, 0.1), "snapshot_every": 2}
    values["evals"] = {"alignment": {"every": 4, "num": 4}, "losses": {"every": 6, "num": 4}}
    return parse(values)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    programs = []

    def listen(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            programs.append(details["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(listen)
    train_run(config, workdir, StopAt(), profiled=range(2, 4))
    jax.monitoring.unregister_event_duration_listener(listen)
    assert programs.count("jit(train_step)") == 1, "compiled ahead, then again in the loop"
    assert programs.count("jit(_eval_loss)") == 1, "one program for both held-out losses"
    return workdir


def metrics(workdir, key="loss"):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m[key] for m in lines if key in m}


def test_the_workdir_has_the_documented_files(config, finished):
    assert parse(json.loads((finished / "config.json").read_text())).seed == config.seed
    assert sorted(metrics(finished)) == [1, 2, 3, 4, 5, 6]
    assert list(metrics(finished, "checkpoint_delay")) == [5], "the checkpoint of step 4"
    assert all(0 < v < 1 for v in metrics(finished, "goodput").values())
    for key in ("grad_norm", "images_per_s", "step_time"):
        assert all(v > 0 for v in metrics(finished, key).values())
    for key in ("eval_loss", "eval_loss_null"):
        assert sorted(metrics(finished, key)) == [3, 6]
    assert sorted(metrics(finished, "alignment/fully")) == [4, 6]
    assert sorted(metrics(finished, "losses/1_to_3")) == [6]
    assert any(finished.glob("events.out.tfevents.*"))
    assert list(finished.glob("profile/plugins/profile/steps_2_to_3/*.xplane.pb"))
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == ["step_4", "step_6"]
    snapshots = sorted(p.name for p in (finished / "snapshots").iterdir())
    assert snapshots == ["step_2", "step_4", "step_6"]
    grids = sorted((finished / "samples").iterdir())
    assert [g.name for g in grids] == ["step_00000003.png", "step_00000006.png"]
    assert min(Image.open(grids[0]).size) > 100


def test_a_resumed_run_repeats_the_losses_of_an_uninterrupted_run(config, finished, tmp_path):
    # Step 3 is between checkpoints, so the stop itself must save. It leaves out what is due then.
    train_run(config, tmp_path, StopAt(3))
    assert sorted(metrics(tmp_path)) == [1, 2, 3]
    assert (tmp_path / "checkpoints" / "step_3").is_dir()
    assert not metrics(tmp_path, "eval_loss") and not (tmp_path / "samples").exists()
    assert json.loads((tmp_path / "state.json").read_text())["state"] == "preempted"
    train_run(config, tmp_path, StopAt())
    assert metrics(tmp_path) == metrics(finished)
    for key in ("eval_loss", "eval_loss_null", "losses/-3_to_-1"):
        assert metrics(tmp_path, key) == metrics(finished, key)
    grids = [workdir / "samples" / "step_00000003.png" for workdir in (tmp_path, finished)]
    assert grids[0].read_bytes() == grids[1].read_bytes()
    starts = (tmp_path / "starts.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in starts] == [0, 3]


def test_any_width_of_ema_loads_after_training(finished):
    config = read_config(finished)
    experiment = build(config)
    with contextlib.closing(Checkpoints(finished)) as checkpoints:
        state, _ = checkpoints.restore(experiment.abstract_state, config.identity)
    for width, average in zip(config.ema.widths, state.averages, strict=True):
        _, params = load(finished, ema=width)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, average)
    earlier, between = load(finished, step=4, ema=0.1)[1], load(finished, ema=0.07)[1]
    leaves = [np.concatenate([x.ravel() for x in jax.tree.leaves(p)]) for p in (earlier, between)]
    ema = np.concatenate([np.ravel(x) for x in jax.tree.leaves(state.params)])
    assert all(1e-6 < np.abs(leaf - ema).max() < 1e-2 for leaf in leaves)
    (stage,) = cascade.load(finished, ema=0.07).stages
    assert (stage.step, stage.ema) == (6, 0.07)
    jax.tree.map(np.testing.assert_array_equal, stage.params, between)


@pytest.mark.parametrize(
    "width, step, words",
    [
        (0.5, None, "--ema is 0.5; allowed: 0.01 to 0.25"),
        (0.01, None, "--ema is 0.01, which the 3 snapshots up to step 6 cannot rebuild; choose"),
        (0.05, 5, r"no checkpoint of step 5 in .*snapshots; found \[2, 4, 6\]"),
    ],
)
def test_a_width_that_cannot_be_rebuilt_is_a_one_line_error(finished, width, step, words):
    with pytest.raises(UserError, match=words) as e:
        load(finished, step, width)
    assert "\n" not in str(e.value)


def test_the_time_to_the_first_step_is_logged_by_part(finished):
    (line,) = (finished / "metrics.jsonl").read_text().splitlines()[:1]
    parts = {k.removeprefix("startup/"): v for k, v in json.loads(line).items()}
    assert parts.pop("step") == 1
    total = parts.pop("total")
    assert total == pytest.approx(sum(parts.values()))
    assert list(parts) == [
        "init", "first_batch", "network", "data_opening", "compile", "first_step"
    ]  # fmt: skip
    assert min(parts["init"], parts["compile"], parts["first_step"]) > 0


def test_a_killed_run_repeats_the_losses_from_its_last_checkpoint(config, finished, tmp_path):
    class Killed(Exception):
        pass

    class KillAt5(StopAt):
        def __call__(self, step):
            if step == 5:
                raise Killed

    with pytest.raises(Killed):
        train_run(config, tmp_path, KillAt5())
    # A snapshot later than the last checkpoint is of a run that never was.
    shutil.copytree(finished / "snapshots" / "step_6", tmp_path / "snapshots" / "step_5")
    train_run(config, tmp_path, StopAt())
    assert metrics(tmp_path) == metrics(finished)
    assert not (tmp_path / "snapshots" / "step_5").exists()
    spent = json.loads((tmp_path / "goodput.json").read_text())
    assert len(spent["starts"]) == 2
    parts = ("steps", "lost_steps", "compile", "checkpoints", "evaluation", "down")
    assert all(spent["seconds"][part] > 0 for part in parts), spent["seconds"]
    averages = [load(workdir, ema=0.05)[1] for workdir in (tmp_path, finished)]
    jax.tree.map(np.testing.assert_array_equal, *averages)


def test_a_run_with_a_damaged_checkpoint_and_damaged_metrics_resumes_from_the_one_before(
    config, finished, tmp_path, caplog
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    position = tmp_path / "checkpoints" / "step_6" / "position" / "metadata"
    position.write_text(position.read_text().replace("examples", "epamples"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(["\n", *lines, '{"step": 6, "lo\n', "\0" * 9]))
    with caplog.at_level("WARNING", logger="imagen_jax"):
        train_run(config, tmp_path, StopAt())
    assert "step_6 is damaged: position/metadata has another checksum" in caplog.text
    assert "left out 2 damaged line(s), the first is line 1" in caplog.text
    assert metrics(tmp_path) == metrics(finished)
    assert metrics(tmp_path, "checkpoint/damaged_step") == {4: 6}
    saved = [checksums.find_damage(p) for p in (tmp_path / "checkpoints").iterdir()]
    assert saved == ["", ""] and (tmp_path / "damaged" / "step_6").is_dir()


def test_training_a_finished_run_again_changes_nothing(config, finished):
    before = (finished / "metrics.jsonl").read_text()
    train_run(config, finished, StopAt())
    assert (finished / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(("step_time", "most"), [(math.inf, 1), (0.5, 4), (1e-3, 16)])
def test_the_host_runs_ahead_by_two_seconds_and_misses_no_step(step_time, most):
    done, ahead, calls = 0, [], []

    def step(state, batch):
        nonlocal done
        done += 1
        return state, done

    def add(number):
        ahead.append(done - number)
        calls.append(number)
        return {"skipped": False, "loss": 1.0}

    logger = types.SimpleNamespace(
        step_time=step_time,
        restart_clock=lambda: None,
        pause=contextlib.nullcontext,
        waiting=contextlib.nullcontext,
        add=add,
        flush=lambda number: calls.append(f"line {number}"),
    )
    config = types.SimpleNamespace(num_steps=47, log_every=20)
    stage = types.SimpleNamespace(put=lambda batch: batch)
    experiment = types.SimpleNamespace(config=config, step=step, stage=stage)
    saved = []
    actions = types.SimpleNamespace(
        profile=types.SimpleNamespace(starts=lambda number: number == 36, start=lambda state: None),
        started=lambda *args: None,
        watch=lambda number: None,
        guard=Guard(GuardConfig(), 16),
        due=lambda number: [lambda *args: saved.append(number)] if number in (33, 47) else [],
        local_due=lambda number, due: False,
    )
    args = (experiment, None, 0, itertools.repeat(None), logger, actions, StopAt())
    assert run_loop(*args) == FINISHED
    lines = {20: ["line 20"], 40: ["line 40"], 47: ["line 47"]}
    assert calls == [call for n in range(1, 48) for call in [n, *lines.get(n, [])]]
    assert max(ahead) == most and ahead[32] == ahead[46] == 0 and saved == [33, 47]
    assert ahead[19] == 1, "a log line is written as soon as its last step is done"
    assert ahead[34] == 0, "a trace must not contain earlier steps"


def test_a_checkpoint_of_another_model_is_refused(config, finished):
    before = (finished / "config.json").read_text()
    other = dataclasses.replace(config, model={**config.model, "num_res_blocks": 2})
    with pytest.raises(UserError, match=r"another model: config\.model\.num_res_blocks is 2"):
        train_run(other, finished, StopAt())
    assert (finished / "config.json").read_text() == before


def test_sigterm_requests_a_stop():
    import os
    import signal

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        stop = processes.StopRequest()
        assert not stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop(2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_model_too_large_for_the_machine_is_refused_with_figures_and_a_smaller_config(
    tmp_path, monkeypatch
):
    config = parse(load_config("base64"))
    one_device = build(config, jax.devices()[:1])
    monkeypatch.setattr("imagen_jax.training.experiment.build", lambda config: one_device)
    # Less than the run's minimum, 22.2 GiB, only once a share is set aside for the host.
    monkeypatch.setattr("imagen_jax.devices.memory.device_memory", lambda: 24 * 2**30)
    with pytest.raises(UserError) as e:
        train.run(config, tmp_path / "run", Startup(), ())
    message = str(e.value)
    assert all(s in message for s in ("1.99B", "22.2 GiB", "19.2 GiB", "configs/base64.py:tiny"))
    assert "\n" not in message and not (tmp_path / "run").exists()


def test_evaluation_reports_by_category(finished):
    out = finished / "evaluation"
    evaluate.evaluate([finished], {"guidance": ["1", "2"]}, num=4, out=out)
    report = json.loads((out / "alignment.json").read_text())
    assert list(report["columns"]) == ["guidance 1", "guidance 2", "true images"]
    found_groups = report["columns"]["guidance 1"]["table"]
    found = found_groups["all"]
    assert found["num"] == 4 and found["low"] <= found["fully"] <= found["high"]
    assert found["high"] > found["low"] >= 0
    page = (finished / "report.html").read_text()
    # Losses, alignment over guidance, extremes, samples.
    assert page.count("data:image/png;base64,") == 1 + 1 + 2 * 2 * 2 + 4 * 3
    assert page.count('class="bar"') == 3 * len(found_groups)
    assert "Samples during training" in page and page.count("data:image/webp") >= 1
    assert 'class="yes"' in page or 'class="no"' in page
    assert all(c in page for c in found_groups)
    shares = [100 * found[key] for key in ("fully", "low", "high", "claims")]
    assert "{:.0f}% ({:.0f}-{:.0f}%), claims {:.0f}%".format(*shares) in page


def test_two_checkpoints_are_compared_by_their_losses(config, finished, tmp_path):
    outs = tmp_path / "4", tmp_path / "6"
    for out in outs:
        step = int(out.name)
        evaluate.evaluate([finished], {}, num=8, out=out, metrics=["losses"], step=step)
    results = [json.loads((out / "losses.json").read_text()) for out in outs]
    (a,), (b,) = (r["columns"].values() for r in results)
    assert a["protocol"]["stages"][0]["step"] == 4 and len(a["table"]) == 6
    differences = np.subtract(*(t["table"]["1 to 3"]["scores"] for t in (b, a)))
    lines = protocol.compare(*(out / "losses.json" for out in outs))
    line = next(line for line in lines if "1 to 3" in line)
    error = np.std(differences, ddof=1) / np.sqrt(8)
    assert f"difference {differences.mean():+.4f} (" in line and "8 pairs" in line
    assert f"standard error {error:.4f}" in line
    # Far less than the error of each loss alone: both saw the same noise.
    assert error < 0.5 * np.std(a["table"]["1 to 3"]["scores"], ddof=1) / np.sqrt(8)


def test_evaluation_compares_widths_of_ema(finished):
    out = finished / "evaluation"
    settings = {"guidance": ["1"], "ema": ["0.05", "0.1"]}
    evaluate.evaluate([finished], settings, num=4, out=out)
    report = json.loads((out / "alignment.json").read_text())
    assert list(report["columns"])[:2] == ["guidance 1, EMA 0.05", "guidance 1, EMA 0.1"]
    weights = [c["protocol"]["stages"][0]["weights"] for c in list(report["columns"].values())[:2]]
    assert weights == ["EMA, width 0.05", "EMA, width 0.1"]
    assert "guidance 1, EMA 0.05" in (finished / "report.html").read_text()
    assert (out / "samples_guidance_1_EMA_0.1.png").exists()


def run(module, *args):
    command = [sys.executable, "-m", module, *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (
            ["--config=configs/demo.py:unet", "--workdir=w", "--config.model.embed_dimm=64"],
            "config.model.embed_dimm is not a known key; did you mean model.embed_dim?",
        ),
        (
            ["--config=configs/demo.py", "--workdir=w", "--config.batch_size=many"],
            "config.batch_size is 'many'; it must be of type int",
        ),
        (
            ["--config=configs/demo.py", "--workdir=w", "--profile_steps=9:8"],
            "--profile_steps is '9:8'; allowed: FIRST:LAST, steps from 1 to 2200",
        ),
        (["--config=configs/demo.py", "--workdir=/proc/no"], "--workdir=/proc/no cannot"),
        (
            ["--config=configs/demo.py", "--workdir=w", "--config.evals.alignment.every=0"],
            "config.evals.alignment.every is 0; allowed: 1 or more",
        ),
        (
            ["--config=configs/demo.py", "--workdir=w", "--config.evals.losses.num=4"],
            "config.evals.losses.every is missing",
        ),
        (
            ["--config=configs/base64.py", "--workdir=w", "--config.data.dir=/nowhere"],
            "; or try --config=configs/base64.py:tiny, which draws its own data",
        ),
        (
            [
                "--config=configs/demo.py",
                "--workdir=w",
                "--config.data.dir=/nowhere",
                "--config.data.build=false",
            ],
            "make it with: python -m data_pipelines.scenes --data_dir=/nowhere --resolution=32",
        ),
    ],
    ids=["key", "value", "profile", "workdir", "every", "missing", "data", "scenes"],
)
def test_bad_configs_are_one_line_errors_before_tensorflow_loads(args, words):
    done = run("imagen_jax.train", *args)
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (ROOT / "w").exists()


def test_without_a_workdir_the_run_is_named_after_the_config(config, tmp_path, monkeypatch, caplog):
    """Runs the command's main with everything after the checks replaced."""
    monkeypatch.chdir(tmp_path)
    flags = {
        "config": f"{ROOT}/configs/base64.py:tiny", "set": [], "workdir": None,
        "distributed": False, "coordinator": "", "num_processes": 1, "profile_steps": "",
        "replay_step": None,
        "compilation_cache": "",
    }  # fmt: skip
    workdirs = []
    monkeypatch.setattr(train, "FLAGS", types.SimpleNamespace(**flags))
    monkeypatch.setattr(
        train, "run", lambda config, workdir, *args: workdirs.append(workdir) or True
    )
    with caplog.at_level("INFO", logger="imagen_jax"):
        train.main([])
    assert workdirs == [tmp_path / "runs" / "base64_tiny"]
    assert f"workdir: {workdirs[0]} (--workdir chooses another)" in caplog.text
