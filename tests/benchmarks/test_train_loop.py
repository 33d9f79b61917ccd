"""The measured loop is that of training."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_the_training_loop_is_compared_with_the_bare_step(tmp_path):
    config = ROOT / "configs" / "demo.py"
    settings = ["data.num_train=64", "model.depth=1", "model.width=32", "batch_size=8"]
    command = [sys.executable, "-m", "benchmarks.train_loop", f"--config={config}", "--steps=2"]
    done = subprocess.run(
        [*command, "--rounds=1", *(f"--set={s}" for s in settings)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| overhead of the loop |" in done.stdout
