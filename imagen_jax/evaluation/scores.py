"""Precision and recall, the Inception score and the CLIP score, in float64."""

from __future__ import annotations

import itertools

import numpy as np

from imagen_jax.evaluation.distances import BLOCK, in_blocks, squared_distances


def precision_recall(x: np.ndarray, y: np.ndarray, k: int = 3) -> tuple[float, float]:
    """Returns improved precision and recall (arXiv:1904.06991).

    A set's manifold is the union of balls around its features, each reaching to the k-th nearest
    other feature. Precision is the share of x in the manifold of y; recall, of y in that of x.

    Args:
      x: features of samples [N, D], with N > k.
      y: features of the reference [M, D], with M > k.
    """
    return _covered(x, y, _radii(y, k)), _covered(y, x, _radii(x, k))


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Returns the squared distance from each feature to its k-th nearest other."""
    rows = []
    for i, block in enumerate(in_blocks(x, "neighbors")):
        squared = _to_all(block, x)
        own = np.arange(len(block))
        squared[own, i * BLOCK + own] = -1  # the feature itself sorts first
        rows.append(np.partition(squared, k, axis=1)[:, k])
    return np.concatenate(rows)


def _covered(points: np.ndarray, centers: np.ndarray, radii: np.ndarray) -> float:
    blocks = in_blocks(points, "covered points")
    inside = [(_to_all(block, centers) <= radii[None]).any(1) for block in blocks]
    return float(np.concatenate(inside).mean())


def _to_all(block: np.ndarray, x: np.ndarray) -> np.ndarray:
    return np.concatenate([squared_distances(block, other) for other in in_blocks(x)], axis=1)


def inception_score(logits: np.ndarray, splits: int, seed: int) -> float:
    """Returns the Inception score (arXiv:1606.03498), as torch-fidelity computes it.

    The mean over splits of exp(mean KL(p(y|x) || p(y))), after a shuffle.

    Args:
      logits: float [N, classes], without the classifier's bias.
      seed: of NumPy's RandomState, which shuffles.
    """
    num = len(logits)
    shuffled = logits[np.random.RandomState(seed).permutation(num)]
    bounds = [i * num // splits for i in range(splits + 1)]
    parts = [shuffled[a:b] for a, b in itertools.pairwise(bounds)]
    return float(np.mean([inception_scores(p, np.ones((1, len(p))))[0] for p in parts]))


def inception_scores(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns the score of one split, taken with each row of counts [R, N]."""
    x = np.asarray(logits, np.float64)
    x = x - x.max(1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    p, weights = np.exp(log_p), counts / counts.sum(1, keepdims=True)
    marginal = weights @ p
    # E[KL] = E[sum p log p] - sum q log q.
    own = weights @ (p * log_p).sum(1)
    return np.exp(own - (marginal * np.log(np.maximum(marginal, 1e-300))).sum(1))


def clip_scores(images: np.ndarray, captions: np.ndarray) -> np.ndarray:
    """Returns 100 max(cos, 0) of each image and its caption, given embeddings of length 1."""
    cosine = (np.asarray(images, np.float64) * np.asarray(captions, np.float64)).sum(1)
    return 100 * np.maximum(cosine, 0)
