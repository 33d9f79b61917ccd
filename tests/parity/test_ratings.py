"""Bradley-Terry and Krippendorff's alpha equal those of choix and krippendorff."""

import numpy as np
import pytest

from imagen_jax.evaluation.rating import statistics

choix = pytest.importorskip("choix")
krippendorff = pytest.importorskip("krippendorff")


def test_bradley_terry():
    rng = np.random.default_rng(0)
    wins = rng.integers(0, 40, (5, 5)).astype(float)
    np.fill_diagonal(wins, 0)
    padded = wins + statistics.PRIOR_WINS * (1 - np.eye(5))
    expected = choix.ilsr_pairwise_dense(padded, tol=1e-12)
    np.testing.assert_allclose(statistics.bradley_terry(wins[None])[0], expected, atol=1e-6)


@pytest.mark.parametrize("levels", [(0, 1), (0, 0.5, 1)])
def test_alpha(levels):
    rng = np.random.default_rng(1)
    table = rng.choice([*levels, np.nan], (7, 30))  # raters by units
    table[:, 15:] = np.where(rng.random(15) < 0.5, levels[0], levels[-1])
    raters, units = np.nonzero(~np.isnan(table))
    found = statistics.alpha(units, table[raters, units])
    expected = krippendorff.alpha(table, level_of_measurement="interval")
    assert found == pytest.approx(expected, rel=1e-9)
