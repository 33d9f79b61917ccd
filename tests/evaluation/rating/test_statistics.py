"""Statistics of ratings: coverage of the intervals, agreement, Bradley-Terry, missing raters."""

import math

import numpy as np
import pytest

from imagen_jax.evaluation.rating import statistics


def simulate(rng, raters, prompts, preference, spread_r, spread_p, indifferent=0.2):
    """Answers of raters to prompts, both drawn at random around a known preference.

    Returns values [N, 2] (prefers the first, prefers the second) and the labels of N answers.
    """
    by_prompt = np.repeat(np.arange(prompts), raters)
    by_rater = np.tile(np.arange(raters), prompts)
    shift = rng.choice([-1, 1], raters)[by_rater] * spread_r
    shift = shift + rng.choice([-1, 1], prompts)[by_prompt] * spread_p
    same = rng.random(len(by_prompt)) < indifferent
    first = rng.random(len(by_prompt)) < preference + shift
    return np.column_stack([first & ~same, ~first & ~same]), by_prompt, by_rater


def coverage(runs, replicates, **design):
    """Share of simulated studies whose 95% intervals hold the known rates, [2]."""
    rng, hits = np.random.default_rng(0), np.zeros(2)
    truth = np.array([design["preference"], 1 - design["preference"]]) * 0.8
    for i in range(runs):
        values, prompts, raters = simulate(rng, **design)
        rates = statistics.means(values, prompts, raters, replicates=replicates, seed=i)
        hits += [rate.low <= t <= rate.high for rate, t in zip(rates, truth, strict=True)]
    return hits / runs


DRAWBENCH = {"raters": 25, "prompts": 18, "preference": 0.6, "spread_r": 0.1, "spread_p": 0.1}


def test_intervals_hold_the_known_preference_of_simulated_raters():
    found = coverage(250, 150, **DRAWBENCH)
    assert (found >= 0.93).all() and (found <= 0.97).all(), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"spread_r": 0.2, "spread_p": 0.15},
        {"spread_r": 0, "spread_p": 0.2},
        {"preference": 0.85, "spread_r": 0.1, "spread_p": 0.05},
        {"raters": 10, "prompts": 40},
        {"raters": 75, "prompts": 18, "preference": 0.4},
    ],
)
def test_intervals_hold_the_known_preference_in_many_studies(changes):
    found = coverage(2000, 300, **DRAWBENCH | changes)
    assert (found >= 0.93).all() and (found <= 0.97).all(), found


def test_clusters_widen_the_interval():
    """Answers that a rater or a prompt decides alone count as one."""
    answers = np.tile([1.0, 0.0], 200)[:, None]
    independent = np.arange(400)
    clusters = np.repeat(np.arange(40), 10)
    answers_by_cluster = np.repeat(np.tile([1.0, 0.0], 20), 10)[:, None]
    [narrow] = statistics.means(answers, independent, independent)
    [wide] = statistics.means(answers_by_cluster, independent, clusters)
    ratio = (wide.high - wide.low) / (narrow.high - narrow.low)
    assert 2.8 < ratio < 3.8  # sqrt(10), and a wider t


def test_one_rater_or_one_prompt_shows_no_spread():
    [rate] = statistics.means(np.ones((5, 1)), range(5), [0] * 5)
    assert rate.value == 1 and math.isnan(rate.low) and math.isnan(rate.raters_needed(0.05))


def test_full_agreement_still_has_an_interval():
    [rate] = statistics.means(np.ones((50, 1)), np.repeat(range(10), 5), np.tile(range(5), 10))
    assert rate.high == pytest.approx(1) and 0.5 < rate.low < 0.6


def test_missing_raters_bring_the_margin():
    """A study with as many raters as were asked for has about that margin."""
    rng = np.random.default_rng(3)
    design = DRAWBENCH | {"prompts": 150, "spread_r": 0.2, "spread_p": 0}
    values, prompts, raters = simulate(rng, **design)
    [rate, _] = statistics.means(values, prompts, raters)
    needed = rate.raters_needed(0.03)
    values, prompts, raters = simulate(rng, **design | {"raters": 25 + needed})
    [after, _] = statistics.means(values, prompts, raters)
    assert 0.024 < (after.high - after.low) / 2 < 0.036
    assert after.raters_needed(0.1) == 0


def test_raters_cannot_replace_prompts():
    values, prompts, raters = simulate(
        np.random.default_rng(0), raters=50, prompts=6, preference=0.5, spread_r=0, spread_p=0.4
    )
    assert statistics.means(values, prompts, raters)[0].raters_needed(0.05) == math.inf


def test_alpha_of_a_published_example():
    """Nominal example of K. Krippendorff, "Computing Krippendorff's alpha-reliability" (2011).

    Two observers, ten units, two values: alpha is 0.095.
    """
    first = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    second = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert statistics.alpha([*range(10)] * 2, first + second) == pytest.approx(0.095, abs=5e-4)
    assert statistics.alpha([0, 0, 1, 1], [1, 1, 0, 0]) == 1
    assert math.isnan(statistics.alpha([0, 0], [1, 1]))
    assert math.isnan(statistics.alpha([], []))


def test_bradley_terry_of_two_models_is_the_log_odds():
    prior = statistics.PRIOR_WINS
    wins = np.array([[[0, 30.0], [10.0, 0]], [[0, 5.0], [5.0, 0]], [[0, 9.0], [0.0, 0]]])
    found = statistics.bradley_terry(wins)
    odds = np.log((wins[:, 0, 1] + prior) / (wins[:, 1, 0] + prior))
    np.testing.assert_allclose(found[:, 0] - found[:, 1], odds, rtol=1e-9)


def expected_strengths(strengths, spread):
    """What Bradley-Terry finds in endless tournaments: opinions of many raters, on average.

    Averaging over opinions flattens the curve of the win probability, so these are smaller.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    gaps = np.subtract.outer(strengths, strengths)[..., None] + nodes * np.sqrt(2) * spread
    wins = (1 / (1 + np.exp(-gaps)) @ weights) / weights.sum()
    return statistics.bradley_terry(1e9 * wins[None] * (1 - np.eye(len(strengths))))[0]


def tournament(rng, strengths, raters, prompts, spread):
    """Comparisons of all pairs of models; strengths vary by rater and prompt, N(0, spread^2)."""
    k = len(strengths)
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    rows = [(i, j, p, r) for i, j in pairs for p in range(prompts) for r in range(raters)]
    first, second, by_prompt, by_rater = map(np.array, zip(*rows, strict=True))
    scale = spread / np.sqrt(2)
    seen = np.asarray(strengths) + rng.normal(0, scale, (prompts, k))[by_prompt]
    seen = seen + rng.normal(0, scale, (raters, k))[by_rater]
    n = np.arange(len(rows))
    scores = rng.random(len(rows)) < 1 / (1 + np.exp(seen[n, second] - seen[n, first]))
    return first, second, scores.astype(float), by_prompt, by_rater


MODELS = np.array([0.6, 0.0, -0.6])


def test_strengths_of_a_tournament():
    data = tournament(np.random.default_rng(0), MODELS, raters=30, prompts=20, spread=0.6)
    found, truth = statistics.strengths(*data, replicates=200), expected_strengths(MODELS, 0.6)
    np.testing.assert_allclose(found.value, truth, atol=0.25)
    assert (found.low < found.value).all() and (found.value < found.high).all()
    assert found.value.sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
def test_intervals_of_strengths_hold_the_true_ones():
    rng, hits, truth = np.random.default_rng(0), np.zeros(3), expected_strengths(MODELS, 0.6)
    for i in range(1000):
        data = tournament(rng, MODELS, raters=20, prompts=15, spread=0.6)
        found = statistics.strengths(*data, replicates=200, seed=i)
        hits += (found.low <= truth) & (truth <= found.high)
    assert (hits >= 930).all() and (hits <= 970).all(), hits
