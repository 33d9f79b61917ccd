"""Exported programs run with JAX and NumPy alone, and give what the stage gives."""

import os
import subprocess
import sys

import exports
import jax
import numpy as np
import pytest
from conftest import ROOT, FakeEncoder, load_config, shrink_sr, shrink_transformer
from saved_runs import save_run

import imagen_jax
from imagen_jax.common.errors import UserError
from imagen_jax.exporting import programs
from imagen_jax.pipeline import cascade
from imagen_jax.runs import exported

PROMPTS = ["a red circle", "two stars", "a"]

# The example may import only the standard library, JAX and what JAX needs.
BARE = """
import importlib.abc, runpy, sys

class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        names = ("imagen_jax", "flax", "orbax", "safetensors", "etils", "tensorflow", "absl", "PIL")
        if name.partition(".")[0] in names:
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exported_cascade(export_flags, tmp_path_factory):
    """A transformer of 16 pixels and super-resolution to 64: the runs, and their export."""
    base, sr = shrink_transformer(load_config("demo")), shrink_sr(load_config("sr256", "tiny"))
    sr.model.low_res = 16
    runs = [save_run(config, tmp_path_factory.mktemp("run")) for config in (base, sr)]
    args = ["--format=stablehlo", "--guidance=3,1", "--steps=2", f"--prompts={';'.join(PROMPTS)}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "load_encoder", lambda *args: FakeEncoder())
        out = exports.call(tmp_path_factory.mktemp("out"), f"--workdir={','.join(runs)}", *args)
    return runs, out


def example(*args):
    """Runs the example in a process that cannot import this project."""
    path = ROOT / "examples" / "draw_stablehlo.py"
    program = BARE.replace("sys.argv[0]", repr(str(path)))
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        cwd=ROOT.parent,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(args[1].with_suffix(".npy"))


def test_a_cascade_draws_without_this_project(exported_cascade, tmp_path, monkeypatch):
    _, out = exported_cascade
    small = example(out / "1_16", tmp_path / "small.ppm")
    large = example(out / "2_64", tmp_path / "large.ppm", tmp_path / "small.npy")
    assert (tmp_path / "large.ppm").read_bytes().startswith(b"P6 192 64 255\n")
    monkeypatch.setattr(cascade, "load_encoder", lambda *args: FakeEncoder())
    pipe = imagen_jax.load(out)  # the folders also have the weights, and the settings
    for i, prompt in enumerate(PROMPTS):
        expected = pipe(prompt, seed=i, return_stages=True, progress=False)
        for found, [want] in zip((small[i], large[i]), expected, strict=True):
            np.testing.assert_allclose(found.astype(int), np.asarray(want).astype(int), atol=1)


@pytest.mark.parametrize("folder, index", [("1_16", 0), ("2_64", 1)])
def test_denoise_predicts_the_image(exported_cascade, folder, index):
    """Equal to the network's own prediction, converted by the definition of x_hat."""
    runs, out = exported_cascade
    stage, params = imagen_jax.stage.load(runs[index])
    inputs = programs.denoise(stage).batch(3)
    rng = np.random.default_rng(0)
    values = {k: rng.standard_normal(x.shape).astype(x.dtype) for k, x in inputs.items()}
    values["log_snr"] = np.array([-1.0, 0.0, 2.0], np.float32)
    values["text_mask"] = np.ones(values["text_mask"].shape, bool)
    program = jax.export.deserialize((out / folder / "denoise.stablehlo").read_bytes())
    assert program.platforms == ("cpu", "cuda", "tpu")
    weights = {k: np.asarray(x) for k, x in exported.flat_names(params).items()}
    found = program.call(weights, values)
    z, log_snr = values.pop("z"), values.pop("log_snr")
    output = jax.jit(stage._denoiser(params))(z, log_snr, values)
    snr = np.exp(log_snr.astype(np.float64))[:, None, None, None]
    alpha, sigma = np.sqrt(snr / (1 + snr)), np.sqrt(1 / (1 + snr))
    prediction = stage.config.diffusion.prediction
    expected = {
        "x": output,
        "eps": (z - sigma * output) / alpha,
        "v": alpha * z - sigma * output,
    }[prediction]
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "args, message",
    [
        (["--prompts=a"], "--prompts is for --format=stablehlo or onnx, not safetensors"),
        (["--format=stablehlo", "--batch_size=2"], "--batch_size is for --format=onnx, not stable"),
        (["--format=stablehlo", "--steps=0"], "--steps is 0; allowed: 1 or more"),
        (["--format=stablehlo", "--guidance=1,2"], "--guidance has 2 values; allowed: 1"),
        (["--format=onnx", "--dtype=bfloat16"], "--dtype is bfloat16; allowed with --format=onnx"),
    ],
)
def test_flags_without_effect_are_refused(exported_cascade, command, tmp_path, args, message):
    with pytest.raises(UserError, match=message):
        command(f"--workdir={exported_cascade[0][0]}", *args)
    assert not list(tmp_path.iterdir())
