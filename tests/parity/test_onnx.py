"""A denoising step in ONNX Runtime equals that in JAX, for every kind of network."""

import json
import logging

import exports
import numpy as np
import pytest
from conftest import FakeEncoder, load_config, shrink, shrink_sr, shrink_transformer
from saved_runs import save_run

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")
logging.getLogger("jax2onnx").setLevel(logging.CRITICAL)  # names each optional library it lacks
pytest.importorskip("jax2onnx")

import jax  # noqa: E402

from imagen_jax import stage  # noqa: E402
from imagen_jax.exporting import programs  # noqa: E402
from imagen_jax.runs import exported  # noqa: E402

CONFIGS = {
    "transformer": lambda: shrink_transformer(load_config("demo")),
    "unet": lambda: shrink(load_config("demo", "unet")),
    "efficient_unet": lambda: shrink_sr(load_config("sr256", "tiny")),
}


@pytest.mark.filterwarnings("ignore")  # the converter's own
@pytest.mark.parametrize("name", CONFIGS)
def test_onnx_runtime_gives_what_jax_gives(tmp_path, monkeypatch, name):
    monkeypatch.setattr(programs, "load_encoder", lambda *args: FakeEncoder())
    config = CONFIGS[name]()
    config.model.dtype = "bfloat16"  # of activations; the export has float32
    (tmp_path / "run").mkdir()
    run = save_run(config, tmp_path / "run")
    with exports.defined_flags():
        args = [f"--workdir={run}", "--format=onnx", "--batch_size=3", "--prompts=a;b;c"]
        out = exports.call(tmp_path / "out", *args)
    assert {"denoise.onnx", "prompts.npz"} == json.loads((out / "export.json").read_text())[
        "files"
    ].keys()
    trained, params = stage.load(run)
    program = programs.denoise(trained, dtype="float32")
    rng = np.random.default_rng(0)
    inputs = {
        k: rng.uniform(0, 1, x.shape).astype(x.dtype) for k, x in program.batch(3).items()
    } | {"log_snr": np.array([-2.0, 0.5, 3.0], np.float32)}
    with np.load(out / "prompts.npz") as prompts:
        inputs |= {k: prompts[k] for k in ("text", "text_mask")}
    session = onnxruntime.InferenceSession(out / "denoise.onnx")
    [found] = session.run(["x_hat"], inputs)
    weights = exported.flat_names(params)
    expected = np.asarray(jax.jit(program.call)(weights, inputs))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    assert np.abs(expected).max() > 0.1
