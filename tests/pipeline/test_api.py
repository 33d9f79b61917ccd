"""The Python API: the snippets of its guide run, and importing the package stays cheap."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import FakeEncoder
from PIL import Image

import imagen_jax
from imagen_jax.common.errors import UserError
from imagen_jax.pipeline import cascade

GUIDE = next(p for p in Path(__file__).parents if (p / "setup.py").exists()) / "docs" / "api.md"


@pytest.fixture
def folder(cascade_runs, tmp_path, monkeypatch):
    """The current folder, with the runs and images that the guide names."""
    (tmp_path / "runs").mkdir()
    for name, workdir in zip(("demo", "demo_sr"), cascade_runs, strict=True):
        (tmp_path / "runs" / name).symlink_to(workdir)
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (60, 80, 3)).astype(np.uint8))
    photo.save(tmp_path / "photo.jpg")
    Image.fromarray(np.eye(60, 80, dtype=np.uint8) * 255).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cascade, "load_encoder", lambda *args: FakeEncoder())
    return tmp_path


def test_the_snippets_of_the_guide_run_in_order(folder, capsys):
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL):
        # The released model would need its own text encoder, which `folder` replaces.
        exec(snippet.replace("load()", 'load("runs/demo")'), names)
    assert Image.open("circle.png").size == (32, 32)
    assert [len(names[n]) for n in ("images", "variations", "repainted")] == [2, 2, 1]
    assert [len(names[n]) for n in ("small", "between_prompts", "between_seeds")] == [2, 4, 4]
    assert names["enlarged"].size == (64, 64)
    printed = capsys.readouterr().out
    assert "2 (32, 32) (64, 64)" in printed and "two blue stars (32, 32, 3)" in printed
    assert "steps is 0; allowed: 1 or more" in printed
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        imagen_jax.load("runs/demo", step=7)
    with pytest.raises(UserError, match=r"--ema is set, but runs/demo keeps no snapshots; train"):
        imagen_jax.load("runs/demo", ema=0.1)
    with pytest.raises(UserError, match=r"^ema has 3 values; allowed: 1, or one per stage \(1\)"):
        imagen_jax.load("runs/demo", ema=[0.1, 0.1, 0.1])


def test_load_without_a_run_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        imagen_jax.load(tmp_path)


def test_load_without_arguments_loads_the_released_model():
    assert [stage.size for stage in imagen_jax.load().stages] == [32, 256]


@pytest.mark.parametrize("module", ["imagen_jax", "imagen_jax.sample"])
def test_import_loads_neither_jax_nor_tensorflow_nor_numpy(module):
    heavy = "{'jax', 'tensorflow', 'flax', 'orbax', 'numpy'}"
    code = f"import sys, {module}; print(sorted({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
