"""An exported model samples as its run does, tells what it is, and is checked when it is loaded."""

import json

import jax
import numpy as np
import pytest
from conftest import FakeEncoder, load_config, shrink_transformer
from safetensors.numpy import load_file
from saved_runs import random_params

import imagen_jax
from imagen_jax import stage as stages
from imagen_jax.common.errors import DAMAGED, RunError, UserError
from imagen_jax.config import parse
from imagen_jax.exporting import layout
from imagen_jax.pipeline import cascade
from imagen_jax.runs import exported, verification, workdir
from imagen_jax.runs.checkpoint import Checkpoints

PROMPTS = ["a red circle", "two stars"]
TABLE = {"all": {"fully": 0.6667, "num": 128, "scores": [0, 1]}}
RESULTS = {
    "alignment": {"split": "heldout", "guidance": {"1.0": TABLE}},
    "fid": {
        "metric": "fid",
        "protocol": {
            "prompts": {"suite": "drawbench", "num": 200, "sha256": "0123456789abcdef"},
            "seeds": {"first": 7, "num": 200},
            "size": 64,
        },
        "columns": {
            name: {"protocol": {"stages": [{"run": "trained", **of}]}, "table": TABLE}
            for name, of in {
                "guidance 2": {"step": 5, "weights": "EMA, decay 0.995"},
                "another step": {"step": 4, "weights": "EMA, decay 0.995"},
                "another average": {"step": 5, "weights": "EMA, width 0.1"},
            }.items()
        },
    },
}


@pytest.fixture(autouse=True)
def fake_encoder(monkeypatch):
    monkeypatch.setattr(cascade, "load_encoder", lambda *args: FakeEncoder())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with an evaluation; its EMA and its weights differ."""
    run = tmp_path_factory.mktemp("run") / "trained"
    run.mkdir()
    stage = stages.Stage(parse(shrink_transformer(load_config("demo"))))
    ema = random_params(stage)
    params = jax.tree.map(lambda x: x + 1, ema)
    checkpoints = Checkpoints(run, stage.config.checkpoint)
    state = {"ema": ema, "params": params}
    checkpoints.save(5, state, {"examples": 0}, stage.config.identity)
    checkpoints.close()
    workdir.write_config(run, stage.config)
    lines = ('{"step": 4, "eval_loss": 0.25}', '{"step": 9, "eval_loss": 0.125}')
    (run / workdir.METRICS).write_text("".join(f"{line}\n" for line in lines))
    (run / workdir.EVALUATION).mkdir()
    for name, result in RESULTS.items():
        (run / workdir.EVALUATION / f"{name}.json").write_text(json.dumps(result))
    return run


@pytest.fixture
def model(trained, command):
    return command(f"--workdir={trained}", "--license=apache-2.0")


def leaves(params):
    return {name: np.asarray(leaf) for name, leaf in exported.flat_names(params).items()}


def test_an_exported_cascade_samples_as_its_runs_do(cascade_runs, command):
    out = command(f"--workdir={','.join(cascade_runs)}")
    found = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    files = ("model.safetensors", "config.json", "export.json", "README.md")
    each = {f"{stage}/{file}" for stage in ("1_32", "2_64") for file in files}
    assert found == each | {"cascade.json", "README.md"}
    settings = {"guidance": [3, 1], "seed": 5, "return_stages": True, "progress": False}
    expected = imagen_jax.load(*cascade_runs)(PROMPTS, **settings)
    pipe = imagen_jax.load(out)
    for images, wanted in zip(pipe(PROMPTS, **settings), expected, strict=True):
        for image, want in zip(images, wanted, strict=True):
            np.testing.assert_array_equal(np.asarray(image), np.asarray(want))
    assert [stage.step for stage in pipe.stages] == [1, 1]
    with pytest.raises(UserError, match=rf"--workdir={out} is a cascade; choose one of: .*/1_32, "):
        workdir.read_config(out)


def test_the_record_and_the_card_say_what_the_weights_are(trained, model):
    record = json.loads((model / "export.json").read_text())
    assert {k: record[k] for k in ("format", "version", "source", "step", "average", "dtype")} == {
        "format": "safetensors",
        "version": 1,
        "source": trained.name,
        "step": 5,
        "average": "EMA, decay 0.995",
        "dtype": "float32",
    }
    assert record["code"].startswith(imagen_jax.__version__)
    tensors = load_file(model / "model.safetensors")
    assert record["parameters"] == sum(x.size for x in tensors.values())
    assert tensors["blocks.1.attention.q.kernel"].shape == (16, 16)
    card = (model / "README.md").read_text()
    for words in (
        'license: "apache-2.0"',
        "| trained for | 5 steps of 8: 40 images |",
        "byte-tiny (up to 6 tokens)",
        "Held-out loss at step 4: 0.2500.",
        "| protocol | split heldout |",
        "| guidance 1.0 | fully 0.6667, num 128 |",
        "| protocol | suite drawbench, 200 prompts, prompts' SHA-256 0123456789ab, seeds from 7, "
        "64 pixels |",
        "| guidance 2 | fully 0.6667, num 128 |",
        "It saw only captions of: Simple.",
        "Its training had not ended: step 5 of 100.",
        "not on the machine of the export",
        record["sha256"],
    ):
        assert words in card, words
    assert "another" not in card.partition("## Results")[2].partition("## Limits")[0]


def test_bfloat16_is_rounded_and_loads_as_float32(trained, command):
    out = command(f"--workdir={trained}", "--dtype=bfloat16")
    expected = leaves(stages.load(trained)[1])
    for name, leaf in leaves(stages.load(out)[1]).items():
        assert leaf.dtype == np.float32
        rounded = expected[name].astype(jax.numpy.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(leaf, rounded)


def test_raw_weights_and_other_averages_are_recorded(trained, command):
    out = command(f"--workdir={trained}", "--weights=raw")
    assert json.loads((out / "export.json").read_text())["average"] == "none"
    ema = leaves(stages.load(trained)[1])
    for name, leaf in leaves(stages.load(out)[1]).items():
        np.testing.assert_array_equal(leaf, ema[name] + 1)
    stage = cascade.TrainedStage("run", 5, None, None, ema=0.1)
    assert layout.average_of(stage, raw=False) == "EMA, width 0.1"


def test_an_exported_model_can_be_exported_again(model, command, tmp_path):
    again = command(f"--workdir={model}", out=tmp_path / "again")
    first, second = (exported.read(folder) for folder in (model, again))
    assert first == second
    with pytest.raises(UserError, match=r"--weights=raw is set, but .* is exported already"):
        command(f"--workdir={model}", "--weights=raw", out=tmp_path / "raw")


def test_damage_is_found_when_the_model_is_loaded_and_by_verify(model):
    path = model / "model.safetensors"
    assert not any(problem for _, problem in verification.problems(model))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match=r"model\.safetensors is damaged: its SHA-256") as e:
        imagen_jax.load(model)
    assert e.value.code == DAMAGED and "\n" not in str(e.value)
    assert [p for p, problem in verification.problems(model) if problem] == [path]
    path.unlink()
    with pytest.raises(RunError, match=r"cannot be read \(No such file or directory\)"):
        imagen_jax.load(model)


def test_the_weights_of_another_network_are_refused(model):
    fields = json.loads((model / "config.json").read_text())
    fields["model"]["mlp_ratio"] = 1.0
    (model / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"blocks\.0\.mlp\.down\.kernel has shape"):
        imagen_jax.load(model)


def test_what_only_a_run_has_is_refused(model):
    with pytest.raises(UserError, match=r"no checkpoint of step 7 in .*; the exported model is"):
        imagen_jax.load(model, step=7)
    with pytest.raises(UserError, match=r"is an exported model, which has one average; export"):
        imagen_jax.load(model, ema=0.1)
    with pytest.raises(UserError, match=r"is an exported model, which cannot be trained further"):
        workdir.check_trainable(model)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "version is 2; this code reads 1"),
        ({"step": "5"}, "step is '5'; expected int"),
        ({"sha256": None}, "sha256 is None; expected str"),
    ],
)
def test_another_record_is_a_one_line_error(model, change, message):
    record = json.loads((model / "export.json").read_text())
    (model / "export.json").write_text(json.dumps({**record, **change}))
    with pytest.raises(UserError, match=message):
        imagen_jax.load(model)


@pytest.mark.parametrize("stages", ["[]", '["../a"]', '[".."]', '[""]', "3", "[1]"])
def test_a_cascade_names_only_folders_beside_it(tmp_path, stages):
    (tmp_path / workdir.CASCADE).write_text(f'{{"stages": {stages}}}')
    with pytest.raises(UserError, match="it must list folders beside this file"):
        imagen_jax.load(tmp_path)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--workdir=none"], "holds no run"),
        (["--workdir={run}", "--weights=raw", "--ema=0.1"], "choose one"),
        (["--workdir={run}", "--ema=0.1"], "keeps no snapshots"),
        (["--workdir={run}", "--step=7"], "no checkpoint of step 7"),
        (["--workdir={run},{run}"], "is a base model, but follows"),
    ],
)
def test_bad_input_writes_nothing(trained, command, tmp_path, args, message):
    with pytest.raises(UserError, match=message) as e:
        command(*(arg.format(run=trained) for arg in args))
    assert "\n" not in str(e.value) and not list(tmp_path.iterdir())


def test_a_folder_that_is_in_use_is_left_alone(trained, command, tmp_path):
    (tmp_path / "file").write_text("")
    for out, message in ((tmp_path, "is not empty"), (tmp_path / "file", "is a file")):
        with pytest.raises(UserError, match=f"--out=.* {message}; name a new folder"):
            command(f"--workdir={trained}", out=out)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_export_that_fails_leaves_nothing(trained, command, tmp_path, monkeypatch):

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exported, "write_record", fail)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        command(f"--workdir={trained}")
    assert not list(tmp_path.iterdir())
