"""Statistics of ratings: rates with intervals, raters still needed, agreement, Bradley-Terry.

Two answers are correlated if they come from one rater or are about one prompt. Resampling raters
and prompts together counts the noise of single answers about three times (Owen 2007, "The
pigeonhole bootstrap"), which makes intervals too wide. So each is resampled alone, and the
variances combine as in two-way clustered regression (Cameron, Gelbach and Miller 2011):

    variance = by prompt + by rater - by answer
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from imagen_jax.common.intervals import wilson

REPLICATES = 1000
# Wins that every ordered pair of models gets in advance, so that strengths stay finite. For two
# models, half a win each makes the log-odds unbiased to first order (Haldane 1956, Anscombe 1956).
PRIOR_WINS = 0.5

# Sums of features [B, D] of B resamples -> what is estimated from each, [B, E].
Statistic = Callable[[np.ndarray], np.ndarray]


class Spread(NamedTuple):
    """What is estimated, and its variance by source.

    Attributes:
      value: [E].
      by_prompt, by_rater, by_answer: bootstrap variances [E] when prompts, raters or answers are
        resampled; nan if there are fewer than two.
      prompts, raters: how many there are.
    """

    value: np.ndarray
    by_prompt: np.ndarray
    by_rater: np.ndarray
    by_answer: np.ndarray
    prompts: int
    raters: int

    @property
    def variance(self) -> np.ndarray:
        """Variance with prompts and raters as clusters, [E]; at least that by answers."""
        return np.maximum(self.by_prompt + self.by_rater - self.by_answer, self.by_answer)

    @property
    def quantile(self) -> np.ndarray:
        """The 97.5% quantile of Student's t with Satterthwaite's degrees of freedom, [E]."""
        of_prompts = self.by_prompt**2 / max(1, self.prompts - 1)
        of_raters = self.by_rater**2 / max(1, self.raters - 1)
        with np.errstate(invalid="ignore", divide="ignore"):
            df = self.variance**2 / (of_prompts + of_raters)
        return special.stdtrit(np.maximum(1, np.nan_to_num(df, nan=1.0, posinf=1e6)), 0.975)


class Estimate(NamedTuple):
    """A mean of answers between 0 and 1.

    Attributes:
      low, high: ends of the 95% interval; nan with one prompt or one rater, which show no spread.
      fixed: variance that more raters do not reduce, as more prompts would.
      shared: variance that is divided by the number of raters.
      raters: the number of raters so far.
    """

    value: float
    low: float
    high: float
    fixed: float
    shared: float
    raters: int

    def raters_needed(self, margin: float) -> float:
        """Returns how many more raters make the interval +-margin; inf if only prompts can."""
        allowed = (margin / 1.96) ** 2 - self.fixed
        if math.isnan(self.low):
            return math.nan
        if allowed <= 0:
            return math.inf
        return max(0, math.ceil(self.raters * (self.shared / allowed - 1)))


def spread(
    features: np.ndarray,
    prompts: Sequence,
    raters: Sequence,
    statistic: Statistic,
    replicates: int = REPLICATES,
    seed: int = 0,
) -> Spread:
    """Estimates from N answers, with bootstrap variances over prompts, raters and answers.

    Args:
      features: [N, D]; what is estimated depends on their sums only.
      prompts, raters: N labels, whose equal values are clusters.
    """
    features, rng = np.asarray(features, float), np.random.default_rng(seed)
    value = statistic(features.sum(0)[None])[0]

    def variance(labels: Sequence) -> tuple[np.ndarray, int]:
        _, clusters = np.unique(np.asarray(labels), return_inverse=True)
        count = int(clusters.max()) + 1
        if count < 2:
            return np.full_like(value, math.nan), count
        sums = np.zeros((count, features.shape[1]))
        np.add.at(sums, clusters, features)
        draws = rng.multinomial(count, np.full(count, 1 / count), replicates)
        return statistic(draws @ sums).var(0) * count / (count - 1), count

    (by_prompt, n_prompts), (by_rater, n_raters) = variance(prompts), variance(raters)
    # Few answers differ, so drawing answers is drawing how often each different one comes.
    kinds, counts = np.unique(features, axis=0, return_counts=True)
    draws = rng.multinomial(len(features), counts / len(features), replicates)
    by_answer = statistic(draws @ kinds).var(0)
    return Spread(value, by_prompt, by_rater, by_answer, n_prompts, n_raters)


def means(values: np.ndarray, prompts: Sequence, raters: Sequence, **options) -> list[Estimate]:
    """Returns the means of K quantities between 0 and 1, with 95% intervals.

    The interval is Wilson's, with the number of independent answers that has the same variance. If
    all answers agree, their number is that of raters or prompts, whichever is smaller.

    Args:
      values: [N, K]: K quantities of each of N answers.
      prompts, raters: N labels.
    """
    features = np.column_stack([values, np.ones(len(values))])
    found = spread(features, prompts, raters, lambda s: s[:, :-1] / s[:, -1:], **options)
    fixed = np.maximum(0, found.by_prompt - found.by_answer)
    columns = (found.value, found.variance, found.quantile, fixed)
    estimates = []
    for value, variance, quantile, stays in zip(*columns, strict=True):
        low = high = math.nan
        if not math.isnan(variance):
            if variance > 0:
                number = value * (1 - value) / variance
            else:
                number, quantile = min(found.prompts, found.raters), 1.96
            low, high = wilson(value * number, number, quantile)
        figures = map(float, (value, low, high, stays, variance - stays))
        estimates.append(Estimate(*figures, found.raters))
    return estimates


def alpha(units: Sequence, scores: Sequence[float]) -> float:
    """Returns Krippendorff's alpha with the interval metric; nan if no two answers can differ.

    1 is full agreement, 0 what chance would give. For two possible scores it equals the nominal
    alpha. Krippendorff, "Content Analysis", chapter on reliability.

    Args:
      units: what was rated, one label per answer.
      scores: the answers.
    """
    _, units = np.unique(np.asarray(units), return_inverse=True)
    levels, scores = np.unique(np.asarray(scores, float), return_inverse=True)
    if not len(levels):
        return math.nan
    counts = np.zeros((units.max() + 1, len(levels)))
    np.add.at(counts, (units, scores), 1)
    counts = counts[counts.sum(1) > 1]  # one answer has nothing to agree with
    distances = (levels[:, None] - levels[None, :]) ** 2
    totals = counts.sum(0)
    expected = totals @ distances @ totals / max(1, totals.sum() - 1)
    if expected == 0:
        return math.nan
    within = np.einsum("uc,ck,uk->u", counts, distances, counts) / (counts.sum(1) - 1)
    return float(1 - within.sum() / expected)


def bradley_terry(wins: np.ndarray) -> np.ndarray:
    """Returns the log-strengths of K models, which add up to 0, by maximum likelihood.

    Model i beats model j with probability sigmoid(strength_i - strength_j) (Bradley and Terry
    1952). Each ordered pair starts with PRIOR_WINS.

    Args:
      wins: [B, K, K]: how often i beat j in each of B resamples; a tie is half a win for both.

    Returns:
      [B, K].
    """
    k = wins.shape[-1]
    wins = wins + PRIOR_WINS * (1 - np.eye(k))
    games = wins + wins.swapaxes(1, 2)
    strengths = np.zeros(wins.shape[:2])
    for _ in range(100):  # Newton's method; the log-likelihood is concave
        p = special.expit(strengths[:, :, None] - strengths[:, None, :])
        slope = (wins - games * p).sum(2)
        weights = games * p * (1 - p)
        curvature = weights.sum(2)[:, :, None] * np.eye(k) - weights + 1 / k
        step = np.linalg.solve(curvature, slope[..., None])[..., 0]
        strengths = strengths + np.clip(step, -2, 2)
        if np.abs(step).max() < 1e-9:
            break
    return strengths - strengths.mean(1, keepdims=True)


class Strengths(NamedTuple):
    """Bradley-Terry log-strengths [K] with the ends of their 95% intervals, [K] each."""

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def strengths(
    first: Sequence[int],
    second: Sequence[int],
    scores: np.ndarray,
    prompts: Sequence,
    raters: Sequence,
    **options,
) -> Strengths:
    """Fits Bradley-Terry to N comparisons, with intervals clustered by prompt and rater.

    Args:
      first, second: the two models of each comparison, as numbers from 0.
      scores: [N]: 1 if the first was preferred, 0 if the second, 0.5 if neither.
    """
    k = max(*first, *second) + 1
    rows, first, second = np.arange(len(scores)), np.asarray(first), np.asarray(second)
    wins = np.zeros((len(scores), k, k))
    wins[rows, first, second] = scores
    wins[rows, second, first] = 1 - np.asarray(scores)

    def fit(sums: np.ndarray) -> np.ndarray:
        return bradley_terry(sums.reshape(-1, k, k))

    found = spread(wins.reshape(len(scores), -1), prompts, raters, fit, **options)
    half = found.quantile * np.sqrt(found.variance)
    return Strengths(found.value, found.value - half, found.value + half)
