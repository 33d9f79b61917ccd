"""A cascade is evaluated, interrupted and resumed; what it cannot do is refused in one line."""

import json

import jax
import numpy as np
import pytest
from conftest import FakeEncoder, load_config, shrink
from saved_runs import random_params

from imagen_jax import evaluate
from imagen_jax.common.errors import UserError
from imagen_jax.config import parse
from imagen_jax.diffusion.process import to_float
from imagen_jax.evaluation import losses, protocol, samples, suites
from imagen_jax.stage import Stage


@pytest.fixture
def run(cascade_runs, tmp_path, monkeypatch):
    """Evaluates the cascade on five drawn scenes, two in a batch."""
    monkeypatch.setattr(samples, "BATCH", 2)
    for module in ("imagen_jax.pipeline.cascade", "imagen_jax.text"):
        monkeypatch.setattr(f"{module}.load_encoder", lambda *args: FakeEncoder())
    workdirs = [suites.Path(w) for w in cascade_runs]

    def run(settings, workdirs=workdirs, out="out", **more):
        args = {"scenes": True, "num": 5, **more}
        evaluate.evaluate(workdirs, settings, out=tmp_path / out, **args)
        path = tmp_path / out / "alignment.json"
        return json.loads(path.read_text()) if path.exists() else None

    run.workdirs = workdirs
    return run


def test_a_cascade_starts_from_drawn_and_from_true_images_and_resumes(run, tmp_path, monkeypatch):
    settings = {"guidance": ["1", "2/1"], "low_res": ["drawn", "true"]}
    calls, real = [], Stage.sample

    def fails_at_the_fourth(stage, *args, **kwargs):
        calls.append(stage.config.unet.image_size)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(stage, *args, **kwargs)

    monkeypatch.setattr(Stage, "sample", fails_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    stored = sorted((tmp_path / "out" / "samples").rglob("*.npy"))
    assert len(stored) == 1, "whole batches only: two stages of the first, half of the second"
    before = stored[0].read_bytes()
    result = run(settings)
    # Three batches of two stages for each point with drawn images, less the stored one. From true
    # images both points have the same super-resolution, so they are sampled once.
    assert len(calls) - 4 == 2 * 3 * 2 - 2 + 3
    assert stored[0].read_bytes() == before
    names = [f"guidance {g}, low res {r}" for g in ("1", "2/1") for r in ("drawn", "true")]
    assert list(result["columns"]) == [*names, "true images"]
    drawn, true = (result["columns"][name]["protocol"] for name in names[:2])
    assert [s["size"] for s in drawn["stages"]] == [32, 64] and len(true["stages"]) == 1
    weights = [s["sampling"]["guidance_weight"] for s in
               result["columns"]["guidance 2/1, low res drawn"]["protocol"]["stages"]]  # fmt: skip
    assert weights == [2, 1] and all(len(s["checksums_sha256"]) == 64 for s in drawn["stages"])
    shared = result["protocol"]
    assert shared["size"] == 64 and shared["seeds"] == {"first": 0, "num": 5}
    assert shared["prompts"]["suite"] == "scenes" and len(shared["prompts"]["ids"]) == 5
    assert shared["metric"] == {"check": "scenes"} and shared["code"]["imagen_jax"]
    assert (tmp_path / "out" / "grid_guidance_low_res.png").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Sweep" in page and "Protocol of alignment" in page

    done = len(calls)
    stored[0].write_bytes(before[:-1])
    assert run(settings) == result and len(calls) == done + 2, "only the damaged batch is drawn"
    assert stored[0].read_bytes() == before

    path = tmp_path / "out" / "alignment.json"
    lines = [line for line in protocol.compare(path, path) if ", all: " in line]
    assert len(lines) == 4 and all("difference +0.0000" in line for line in lines)
    assert "5 pairs" in lines[0]
    run({"guidance": ["1"]}, seed=7, out="seven")
    run({"guidance": ["2/1"]}, out="two")
    with pytest.raises(
        UserError, match=r"differ in stages\.0\.sampling\.guidance_weight \(1\.0, 2"
    ):
        protocol.compare(*(tmp_path / out / "alignment.json" for out in ("seven", "two")))


def test_samples_are_those_of_the_pipeline_whatever_the_batch(run, tmp_path):
    from imagen_jax.pipeline import cascade

    run({"guidance": ["2"]}, run.workdirs[:1], num=3)
    suite = evaluate.scenes_suite(parse(json.loads((run.workdirs[0] / "config.json").read_text())),
                                  "heldout", 3, 0)  # fmt: skip
    captions = [e["caption"] for e in suite.examples]
    pipe = cascade.load(run.workdirs[0])
    expected = [np.asarray(pipe(c, guidance=2, seed=i, progress=False)[0])
                for i, c in enumerate(captions)]  # fmt: skip
    files = sorted((tmp_path / "out" / "samples").rglob("*.npy"))
    found = np.concatenate([np.load(path) for path in files])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("settings", "stages", "more", "words"),
    [
        ({"low_res": ["true"]}, slice(1), {}, "low_res:true needs a super-resolution run"),
        ({"low_res": ["drawn"]}, slice(1, 2), {}, "low_res:drawn needs a base model as the first"),
        ({"threshold": ["x"]}, slice(1), {}, "--sweep: threshold is 'x'; allowed: none, static"),
        ({"guidance": ["1/2/3"]}, slice(2), {}, "--sweep: guidance has 3 values; allowed: 1, or"),
        ({"aug_level": ["0.1"]}, slice(1), {}, "--sweep: aug_level=0.1 needs a super-resolution"),
        ({}, slice(1), {"split": "test"}, "--split is 'test'; scenes have train, validation, held"),
        ({}, slice(1), {"metrics": ["losses"]}, "losses, which need the run's dataset; leave out"),
    ],
)
def test_what_a_run_cannot_do_is_one_line(run, settings, stages, more, words):
    with pytest.raises(UserError) as error:
        run(settings, run.workdirs[stages], **more)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_prompts_without_images_are_refused_by_super_resolution_alone(run, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text('Prompts,Category\na "red" dog,Text\n')
    suite = suites.read(path)
    with pytest.raises(UserError, match="--metrics is needed"):
        run({}, suite=suite, scenes=False)
    with pytest.raises(UserError, match="enlarges true images, and these prompts have none"):
        sources = {"judge": "http://127.0.0.1:9", "judge_model": "m"}
        asked = suite._replace(examples=[{**suite.examples[0], "questions": (1,)}])
        run({}, run.workdirs[1:], suite=asked, scenes=False, sources=sources)


def test_the_losses_of_a_network_of_zeros_are_those_of_its_formula():
    stage = Stage(parse(shrink(load_config("demo", "unet"))))
    params = jax.tree.map(lambda x: 0 * x, random_params(stage))
    rng = np.random.default_rng(0)
    examples = [
        {
            "image": rng.integers(0, 256, (32, 32, 3)).astype(np.uint8),
            "text": np.zeros((6, 8), np.float32),
            "text_mask": np.arange(6) < 2,
        }
        for _ in range(9)
    ]
    table = losses.measure(stage, params, examples, progress=False)
    assert table == losses.measure(stage, params, examples, progress=False)
    other = losses.measure(stage, params, examples, seed=1, progress=False)
    # If x_hat is 0, then eps_hat = z / sigma, and the error is SNR x mean(x^2).
    power = np.array([float(np.mean(np.square(to_float(e["image"])))) for e in examples])
    for name, row in table.items():
        low, high = (np.exp(float(edge)) for edge in name.split(" to "))
        ratios = np.array(row["scores"]) / power
        assert (ratios >= low * 0.999).all() and (ratios <= high * 1.001).all()
        assert row["num"] == 9 and row["low"] < row["loss"] < row["high"]
        assert row["scores"] != other[name]["scores"]
    assert next(iter(table)) == "-9 to -6" and "3 to 4" in table
