"""Distances of feature sets: known values, streaming, extrapolation, and honest intervals."""

import numpy as np
import pytest

from imagen_jax.evaluation import distances, scores


def test_moments_do_not_depend_on_the_batches():
    x = np.random.default_rng(0).normal(3, 2, (101, 5)).astype(np.float32)
    found = distances.moments([x[:1], x[1:60], x[60:]])
    assert found.num == 101
    np.testing.assert_allclose(found.mean, x.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_frechet_distance_of_gaussians_with_commuting_covariances():
    a = distances.Moments(9, np.array([1.0, 2.0]), np.diag([4.0, 9.0]))
    b = distances.Moments(9, np.array([1.0, 0.0]), np.diag([1.0, 1.0]))
    assert distances.frechet(a, b) == pytest.approx(4 + (2 - 1) ** 2 + (3 - 1) ** 2)
    assert distances.frechet(a, a) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("num", [6, 40])
def test_draws_of_few_and_of_many_samples_equal_the_plain_distance(num):
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (num, 16))
    reference = distances.moments([rng.normal(size=(200, 16))])
    draws = [np.arange(num), rng.integers(num, size=num)]
    expected = [distances.frechet(distances.moments([x[draw]]), reference) for draw in draws]
    found = distances.frechet_of_draws(x, reference, draws)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_the_distance_at_infinity_removes_the_bias():
    x = np.random.default_rng(0).normal(size=(2000, 16))
    truth = distances.Moments(0, np.zeros(16), np.eye(16))
    [biased] = distances.frechet_of_draws(x, truth, [np.arange(2000)])
    found = distances.frechet_at_infinity(x, truth, seed=0, smallest=200)
    assert biased > 0.02
    assert abs(found) < biased / 3


def test_kernel_distances_do_not_depend_on_the_block_size(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(33, 4)), rng.normal(1, 1, (20, 4))
    counts = distances.resample_counts(33, 3, seed=0)
    functions = (distances.kid_of_counts, distances.cmmd_of_counts)
    expected = [f(x, y, counts) for f in functions]
    precision = scores.precision_recall(x, y)
    monkeypatch.setattr(distances, "BLOCK", 7)
    monkeypatch.setattr(scores, "BLOCK", 7)
    np.testing.assert_allclose([f(x, y, counts) for f in functions], expected, rtol=1e-9)
    assert scores.precision_recall(x, y) == precision


def frechet(x, y, counts):
    draws = [np.repeat(np.arange(len(x)), c.astype(int)) for c in counts]
    return distances.frechet_of_draws(x, distances.moments([y]), draws)


@pytest.mark.parametrize("distance", [frechet, distances.kid_of_counts, distances.cmmd_of_counts])
def test_bootstrap_errors_are_those_of_new_samples(distance):
    rng = np.random.default_rng(0)
    y = rng.normal(size=(150, 4))
    values, halves = [], []
    for seed in range(40):
        x = np.exp(0.5 * rng.normal(size=(150, 4)))
        counts = distances.resample_counts(150, 40, seed)
        value, *resampled = distance(x, y, np.concatenate([np.ones((1, 150)), counts]))
        low, high = distances.interval(value, resampled)
        values.append(value)
        halves.append((high - low) / 2)
    assert 0.7 < np.mean(halves) / 1.96 / np.std(values, ddof=1) < 1.4


def test_kid_in_its_two_forms():
    """The subsets and the weights estimate the same quantity; the weights leave out a constant."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(50, 4)), rng.normal(1, 1, (60, 4))
    [of_counts] = distances.kid_of_counts(x, y, np.ones((1, 50)))
    kernel = distances.polynomial(y, y)
    constant = (kernel.sum() - kernel.trace()) / (60 * 59)
    assert distances.kid(x, y, 400, 40, seed=0) == pytest.approx(of_counts + constant, rel=0.05)


def test_precision_and_recall_of_parts():
    """Half of the samples lie on half of the reference."""
    grid = np.stack(np.meshgrid(np.arange(5.0), np.arange(8.0)), -1).reshape(-1, 2)
    samples = np.concatenate([grid[:20], grid[:20] + 100])
    assert scores.precision_recall(samples, grid) == (0.5, pytest.approx(0.5, abs=0.13))
    assert scores.precision_recall(grid, grid) == (1, 1)


def test_inception_score_counts_the_classes():
    """Certain predictions, evenly over four classes, score 4; equal predictions score 1."""
    certain = 100 * np.eye(4)[np.arange(40) % 4]
    [found] = scores.inception_scores(certain, np.ones((1, 40)))
    assert found == pytest.approx(4)
    assert scores.inception_score(np.ones((40, 4)), 10, seed=0) == pytest.approx(1)


def test_clip_score_is_never_negative():
    unit = np.eye(2, dtype=np.float32)
    assert list(scores.clip_scores(unit[[0, 0, 0]], np.stack([unit[0], unit[1], -unit[0]]))) == [
        100,
        0,
        0,
    ]
