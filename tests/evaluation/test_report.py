"""The report of a run: order of the samples, grids of the training, training time, size."""

import json
import re

import numpy as np
import pytest
from conftest import load_config
from PIL import Image

from imagen_jax.config import parse
from imagen_jax.evaluation import report
from imagen_jax.evaluation.report import TRUE, Sampled
from imagen_jax.runs import workdir as runs


@pytest.fixture
def workdir(tmp_path):
    """A run of 20 sample grids, whose steps take 3 seconds up to step 10 and then 1 second."""
    runs.write_config(tmp_path, parse(load_config("demo")))
    lines = [
        {"step": 10, "loss": 1.0, "step_time": 3.0, "images_per_s": 4.0},
        {"step": 20, "loss": 0.5, "step_time": 1.0, "images_per_s": 12.0},
        {"step": 20, "eval_loss": 0.6},
    ]
    (tmp_path / runs.METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / runs.SAMPLES).mkdir()
    rng = np.random.default_rng(0)
    for step in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3)).astype(np.uint8))
        noise.resize((552, 700)).save(tmp_path / runs.SAMPLES / f"step_{step:08d}.png")
    (tmp_path / runs.EVALUATION).mkdir()
    return tmp_path


def sampled(right, of=4):
    """A caption whose image at guidance 3 satisfies `right` of its claims."""
    images = {c: np.full((32, 32, 3), 9, np.uint8) for c in ("guidance 1", "guidance 3", TRUE)}
    claims = [(f"claim {i}", i < right) for i in range(of)]
    return Sampled(f"<{right} of {of}>", images, {"guidance 3": claims})


def test_samples_are_ordered_by_their_claims_and_the_page_stays_light(workdir):
    path = report.write(workdir, [sampled(n) for n in (2, 4, 0, 3)], [])
    page = path.read_text()
    assert path.stat().st_size < 2e6
    best, worst = page.index("Best at guidance 3"), page.index("Worst at guidance 3")
    captions = re.findall(r"<p>&lt;(\d) of 4&gt;</p>", page[best:])
    assert captions[:4] == ["4", "3", "0", "2"] and best < worst
    assert page.count('class="yes"') == 4 + 3 + 0 + 2
    assert "http" not in page
    slides = re.findall(r'alt="step (\d+)"', page)
    assert len(slides) == report.MOST_GRIDS and (slides[0], slides[-1]) == ("0", "19")
    assert "Step 20, loss 0.5000, 0.7 minutes of training, 12.0 images/s." in page


def test_losses_are_drawn_against_the_time_of_the_steps(workdir, monkeypatch):
    drawn = []
    real = report.pictures.loss_curve
    monkeypatch.setattr(
        report.pictures, "loss_curve", lambda *args: (drawn.append(args), real(*args))
    )
    report.write(workdir, [], [])
    xs, losses, _, held_out, _, xlabel = drawn[0]
    assert xs == [0.5, pytest.approx(40 / 60)] and losses == [1.0, 0.5]
    assert held_out == [(pytest.approx(40 / 60), 0.6)] and xlabel == "minutes of training"


def test_a_run_without_metrics_has_a_report(workdir):
    (workdir / runs.METRICS).unlink()
    page = report.write(workdir, [], []).read_text()
    assert "The run has logged no loss." in page and "Best" not in page
