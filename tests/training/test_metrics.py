"""Log lines average the same steps whether or not the run was interrupted between them."""

import json

import numpy as np

from imagen_jax.diffusion.loss import bucket_names
from imagen_jax.training.metrics import MetricLogger


def steps():
    rng = np.random.default_rng(0)
    buckets = len(bucket_names())
    for _ in range(5):
        yield {
            "loss": np.float32(rng.random()),
            "grad_norm": np.float32(rng.random()),
            "skipped": np.bool_(False),
            "bucket_loss": rng.random(buckets).astype(np.float32),
            "bucket_count": np.ones(buckets, np.float32),
        }


def line(logger, path):
    logger.flush(5)
    logger.close()
    found = json.loads((path / "metrics.jsonl").read_text())
    assert found.pop("step_time") > 0 and found.pop("images_per_s") > 0
    return found


def test_the_steps_between_the_last_line_and_a_checkpoint_count_after_a_resume(tmp_path):
    loggers = [MetricLogger(tmp_path / name, 10, 8, 1.0) for name in ("whole", "killed", "resumed")]
    whole, killed, resumed = loggers
    for number, metrics in enumerate(steps(), start=1):
        whole.add(metrics)
        if number <= 3:
            killed.add(metrics)
        if number == 3:
            window = json.loads(json.dumps(killed.window))
            resumed.resume_at(3, window)
            resumed.restart_clock()
        if number > 3:
            resumed.add(metrics)
    killed.close()
    assert line(whole, tmp_path / "whole") == line(resumed, tmp_path / "resumed")
    resumed.restart_clock()
    assert resumed.window == []


def test_scores_are_those_of_the_lines_that_stay(tmp_path):
    logger = MetricLogger(tmp_path, 10, 8, 1.0, best_by="-clip")
    for step in (1, 2, 3):
        logger.write(step, {"clip": step / 10, "other": 1.0})
    assert logger.scores == {1: -0.1, 2: -0.2, 3: -0.3}
    again = MetricLogger(tmp_path, 10, 8, 1.0, best_by="clip")
    again.resume_at(2)
    assert again.scores == {1: 0.1, 2: 0.2} and {"clip", "other"} <= again.written
