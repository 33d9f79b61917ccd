"""Distances between two sets of features, and their intervals, in float64.

All functions take features [N, D] of any float type. The intervals cover the draw of the samples:
the reference counts as fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

BLOCK = 1024  # rows that are compared at a time
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Moments(NamedTuple):
    """Number of features, their mean [D] and their covariance [D, D], divided by num - 1."""

    num: int
    mean: np.ndarray
    cov: np.ndarray


def moments(batches: Iterable[np.ndarray]) -> Moments:
    """Returns the moments of features that arrive in batches [N, D] (Chan et al. 1983)."""
    num, mean, scatter = 0, np.zeros(()), np.zeros(())
    for batch in batches:
        x = np.asarray(batch, np.float64)
        center = x.mean(0)
        x, delta, total = x - center, center - mean, num + len(x)
        scatter = scatter + x.T @ x + np.multiply.outer(delta, delta) * (num * len(x) / total)
        mean, num = mean + delta * (len(x) / total), total
    return Moments(num, mean, scatter / max(num - 1, 1))


def in_blocks(x: np.ndarray, label: str = "") -> Iterator[np.ndarray]:
    """Yields the rows of an array, BLOCK at a time, in float64; with a label, shows progress."""
    for start in progress(range(0, len(x), BLOCK), label):
        yield np.asarray(x[start : start + BLOCK], np.float64)


def progress(items: Iterable, label: str) -> Iterable:
    """Iterates with a progress bar, if there is a label and it takes more than a few seconds."""
    return tqdm(items, desc=label, leave=False, delay=3) if label else items


def interval(value: float, resampled: Sequence[float]) -> tuple[float, float]:
    """Returns a 95% interval: the value plus and minus 1.96 bootstrap standard errors.

    Not percentiles: a sample with repetitions is farther from any reference than the sample itself,
    so the percentiles of a distance would lie above its value.
    """
    half = 1.96 * float(np.std(resampled, ddof=1))
    return value - half, value + half


def resample(num: int, times: int, seed: int) -> Iterator[np.ndarray]:
    """Yields `times` draws of `num` indices with replacement."""
    rng = np.random.default_rng(seed)
    return (rng.integers(num, size=num) for _ in range(times))


def resample_counts(num: int, times: int, seed: int) -> np.ndarray:
    """Returns how often each index is in each draw of `resample`, float64 [times, num]."""
    draws = resample(num, times, seed)
    return np.stack([np.bincount(draw, minlength=num) for draw in draws]).astype(np.float64)


def _square_root(cov: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _trace_of_root(root: np.ndarray, cov: np.ndarray) -> float:
    """Returns tr((root^2 cov)^(1/2)) through a symmetric matrix with the same eigenvalues."""
    return float(np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov @ root), 0)).sum())


def frechet(a: Moments, b: Moments) -> float:
    """Returns the Frechet distance of two Gaussians (FID, arXiv:1706.08500):

    |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).
    """
    delta = a.mean - b.mean
    cross = _trace_of_root(_square_root(b.cov), a.cov)
    return float(delta @ delta + np.trace(a.cov) + np.trace(b.cov) - 2 * cross)


def frechet_of_draws(
    features: np.ndarray, reference: Moments, draws: Sequence[np.ndarray]
) -> list[float]:
    """Returns the Frechet distance to the reference of each draw, a list of indices of features."""
    x, cov = np.asarray(features, np.float64) - reference.mean, reference.cov
    if len(x) < x.shape[1]:
        # The means and covariances of all draws lie in the span of the samples, which has fewer
        # dimensions than the features.
        basis = np.linalg.qr(x.T)[0]
        x, cov = x @ basis, basis.T @ cov @ basis
    root, trace, values = _square_root(cov), np.trace(reference.cov), []
    for draw in progress(draws, "Frechet distances"):
        _, mean, own = moments(in_blocks(x[draw]))
        values.append(float(mean @ mean + np.trace(own) + trace - 2 * _trace_of_root(root, own)))
    return values


def frechet_at_infinity(
    features: np.ndarray, reference: Moments, seed: int, smallest: int = 5000, points: int = 15
) -> float:
    """Extrapolates the Frechet distance to infinitely many samples (arXiv:1911.07023).

    Its bias is proportional to 1/N, so a line is fitted through the distances of subsets.

    Args:
      smallest: samples in the smallest subset; the largest has all.
      points: number of subsets.
    """
    rng = np.random.default_rng(seed)
    counts = np.linspace(smallest, len(features), points).astype(int)
    draws = [rng.permutation(len(features))[:count] for count in counts]
    values = frechet_of_draws(features, reference, draws)
    return float(np.polyfit(1 / counts, values, 1)[1])


def polynomial(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """KID's kernel, (x y / D + 1)^3, for all pairs of rows."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def gaussian(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """CMMD's kernel, exp(-|x - y|^2 / (2 sigma^2)), for all pairs of rows."""
    return np.exp(-np.maximum(squared_distances(x, y), 0) / (2 * CMMD_SIGMA**2))


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Returns |x - y|^2 of all pairs of rows; rounding can make it slightly negative."""
    return (x**2).sum(1)[:, None] + (y**2).sum(1)[None] - 2 * x @ y.T


def kid(x: np.ndarray, y: np.ndarray, subsets: int, size: int, seed: int) -> float:
    """Returns the Kernel Inception Distance (arXiv:1801.01401), as torch-fidelity computes it.

    The mean over random subsets of the unbiased estimate of the squared MMD.

    Args:
      size: features per subset, drawn without repetition from each of x and y.
      seed: of NumPy's RandomState.
    """
    rng, values = np.random.RandomState(seed), []
    for _ in progress(range(subsets), "KID of subsets"):
        a, b = (np.asarray(f[rng.choice(len(f), size, replace=False)], np.float64) for f in (x, y))
        own = [k.sum() - k.trace() for k in (polynomial(a, a), polynomial(b, b))]
        values.append(sum(own) / (size * (size - 1)) - 2 * polynomial(a, b).mean())
    return float(np.mean(values))


def _forms(
    kernel: Kernel, x: np.ndarray, y: np.ndarray, u: np.ndarray, v: np.ndarray
) -> np.ndarray:
    """Returns sum_ij u[r, i] k(x_i, y_j) v[r, j] for each r, block by block."""
    total = np.zeros(len(u))
    for i, a in enumerate(in_blocks(x, "kernel distances")):
        for j, b in enumerate(in_blocks(y)):
            rows, columns = (slice(n * BLOCK, (n + 1) * BLOCK) for n in (i, j))
            total += np.einsum("rj,rj->r", u[:, rows] @ kernel(a, b), v[:, columns])
    return total


def kid_of_counts(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the squared MMD of x, taken with each row of counts, and y, up to a constant.

    The pairs of a sample with itself are left out, as the unbiased estimate does.
    """
    ones = np.ones((len(counts), len(y)))
    diagonal = np.concatenate([np.diagonal(polynomial(a, a)) for a in in_blocks(x)])
    own = _forms(polynomial, x, x, counts, counts) - counts**2 @ diagonal
    pairs = counts.sum(1) ** 2 - (counts**2).sum(1)
    across = _forms(polynomial, x, y, counts, ones)
    return own / pairs - 2 * across / (counts.sum(1) * len(y))


def cmmd_of_counts(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns CMMD (arXiv:2401.09603) of x, taken with each row of counts, and y.

    1000 times the biased estimate of the squared MMD with a Gaussian kernel of sigma 10. x and y
    are CLIP embeddings of length 1.
    """
    ones = np.ones((len(counts), len(y)))
    own = _forms(gaussian, x, x, counts, counts) / counts.sum(1) ** 2
    other = _forms(gaussian, y, y, ones[:1], ones[:1]) / len(y) ** 2
    across = _forms(gaussian, x, y, counts, ones) / (counts.sum(1) * len(y))
    return CMMD_SCALE * (own + other - 2 * across)
