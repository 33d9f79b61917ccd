"""The PyTorch examples load an export, and their forward passes equal those in JAX."""

import json
import subprocess
import sys

import exports
import jax
import numpy as np
import pytest
from conftest import ROOT, load_config, shrink, shrink_transformer
from saved_runs import save_run

from imagen_jax import stage

torch = pytest.importorskip("torch")

sys.path.insert(0, str(ROOT / "examples"))
import torch_layers  # noqa: E402
from torch_transformer import Transformer  # noqa: E402
from torch_unet import UNet  # noqa: E402

# Every branch of the examples, at least once.
CASES = {
    "demo": (Transformer, shrink_transformer, {}),
    "sequence": (Transformer, shrink_transformer, {"model.text_tokens": "sequence"}),
    "enlarges": (Transformer, shrink_transformer, {"model.low_res": 8, "model.bottleneck": 6}),
    "adds": (Transformer, shrink_transformer, {"model.low_res": 8, "model.low_res_skip": True}),
    "text_patches": (Transformer, shrink_transformer, {"model.text_patch_size": 4}),
    "attention": (Transformer, shrink_transformer, {"text.pooling": "attention"}),
    "no_text": (Transformer, shrink_transformer, {"text.pooling": "none", "text.sequence": "none"}),
    "unet": (UNet, shrink, {}),
    "unet_eps": (UNet, shrink, {"diffusion.prediction": "eps", "model.decoder_extra_block": True}),
    "unet_enlarges": (UNet, shrink, {"model.low_res": 16, "model.use_scale_shift_norm": False}),
    "unet_adds": (UNet, shrink, {"model.low_res": 16, "model.low_res_skip": True}),
    "unet_plain": (UNet, shrink, {"text.sequence": "cross_attention", "text.pooling": "attention"}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_forward_pass_equals_that_in_jax(tmp_path, name):
    network, shrunk, changes = CASES[name]
    config = shrunk(load_config("demo", "transformer" if network is Transformer else "unet"))
    for key, value in changes.items():
        section, _, field = key.partition(".")
        config[section][field] = value
    (tmp_path / "run").mkdir()
    run = save_run(config, tmp_path / "run")
    with exports.defined_flags():
        out = exports.call(tmp_path / "out", f"--workdir={run}")
    trained, params = stage.load(out)
    size, low = config.model.image_size, config.model.get("low_res", 0)
    rng = np.random.default_rng(1)
    z = rng.standard_normal((2, size, size, 3)).astype(np.float32)
    log_snr = np.array([-2.0, 3.0], np.float32)
    cond = {
        "text": rng.standard_normal((2, 6, 8)).astype(np.float32),
        "text_mask": np.arange(6)[None, :] < np.array([[3], [6]]),
    }
    if low:
        low_res = rng.uniform(-1, 1, (2, low, low, 3)).astype(np.float32)
        cond |= {"low_res": low_res, "aug_level": np.array([0.1, 0.7], np.float32)}
    expected = np.asarray(jax.jit(trained._denoiser(params))(z, log_snr, cond))

    def tensor(x):  # images have their channels first
        return torch.tensor(x.transpose(0, 3, 1, 2) if x.ndim == 4 else x)

    with torch.no_grad():
        loaded = torch_layers.load(out, network)
        found = loaded(*map(tensor, (z, log_snr, *cond.values()))).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(expected).max() > 0.1
    count = sum(p.numel() for p in loaded.parameters())
    assert count == json.loads((out / "export.json").read_text())["parameters"]
    if name in ("demo", "unet_enlarges"):
        script = ROOT / "examples" / f"torch_{config.model.get('name', 'unet')}.py"
        done = subprocess.run([sys.executable, script, out], capture_output=True, text=True)
        assert done.stdout.startswith(f"{count:,} parameters; output (1, 3, "), done.stderr
