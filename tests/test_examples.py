"""The examples run from start to end, at a small size."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow


def run(example, out, **settings):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OUT": str(out), **settings}
    environment.pop("XLA_FLAGS", None)  # one device
    command = [sys.executable, str(ROOT / "examples" / example)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_own_images_are_trained_on_and_drawn(tmp_path):
    out = run("own_images.py", tmp_path, STEPS="4", NUM="1")
    assert "'train': 184, 'validation': 16" in out
    assert (tmp_path / "samples" / "grid.png").exists()


def test_a_pod_run_is_planned_and_checked(tmp_path):
    pytest.importorskip("libtpu")
    out = run("plan_pod.py", tmp_path, CONFIG="configs/transformer64.py:tiny,v4-128")
    assert "pace" in out and (tmp_path / "plan" / "plan.html").exists()


def test_guidance_is_explored_with_the_released_model(tmp_path):
    out = run("guidance.py", tmp_path / "guidance.png", NUM="1")
    assert "guidance 8, dynamic" in out and (tmp_path / "guidance.png").exists()
