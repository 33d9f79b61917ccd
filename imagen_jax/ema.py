"""Post-hoc EMA: power-function averages of the weights, and any width rebuilt from snapshots.

In the average at step t, the weights of step tau count

    p(tau; t) = (gamma + 1) tau^gamma / t^(gamma + 1).

The width sigma_rel is the standard deviation of tau / t under p; gamma follows from it. Averages of
two widths, saved from time to time, span the averages of all other widths well enough to fit them
by least squares after training.

Source: EDM2, arXiv:2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax.common.typed_config import require

# Smallest and largest sigma_rel.
NARROWEST, WIDEST = 0.01, 0.25


@dataclasses.dataclass(frozen=True)
class EmaConfig:
    """Config section `ema`: the averages that post-hoc EMA needs; off by default.

    Attributes:
      widths: sigma_rel of the averages kept in the training state, (0.05, 0.1) in the paper; each
        takes as much memory as the weights. () keeps none.
      snapshot_every: steps between snapshots of the averages. A rebuilt width needs a snapshot
        about every width x num_steps steps.
    """

    widths: tuple[float, ...] = ()
    snapshot_every: int = 0

    def __post_init__(self):
        allowed = f"(), or two or more different numbers from {NARROWEST} to {WIDEST}"
        several = len(set(self.widths)) == len(self.widths) != 1
        inside = all(NARROWEST <= width <= WIDEST for width in self.widths)
        require(several and inside, "ema.widths", self.widths, allowed)
        ok = self.snapshot_every > 0 if self.widths else self.snapshot_every == 0
        allowed = "1 or more with ema.widths, else 0"
        require(ok, "ema.snapshot_every", self.snapshot_every, allowed)


def exponent(width: float) -> float:
    """Returns gamma for a width: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3))."""
    roots = np.roots([1, 7, 16 - width**-2, 12 - width**-2])
    return float(roots[np.isreal(roots)].real.max())


def update_averages(
    averages: Sequence[Any], params: Any, widths: Sequence[float], step: jax.Array
) -> tuple[Any, ...]:
    """Updates each average <- b average + (1 - b) params, where b = (1 - 1 / t)^(gamma + 1).

    Args:
      averages: one per width, each like params.
      params: the weights after this step.
      step: number of steps before this one, so t = step + 1.
    """
    # Without log1p and expm1, 1 - b would lose its digits in float32 when t is large.
    log_kept = jnp.log1p(-1.0 / (step.astype(jnp.float32) + 1.0))

    def update(average, width):
        rate = -jnp.expm1((exponent(width) + 1.0) * log_kept)
        return jax.tree.map(lambda a, p: a + rate * (p - a), average, params)

    return tuple(map(update, averages, widths))


def coefficients(
    steps: Sequence[int], widths: Sequence[float], step: int, width: float
) -> tuple[np.ndarray, float]:
    """Fits the average of a width at `step` by snapshots of other averages.

    Minimizes the integral over tau of the squared difference of the profiles p. The coefficients
    sum to 1, so weights that do not change are rebuilt exactly.

    Args:
      steps, widths: of the snapshots.

    Returns:
      The coefficients of the snapshots, and the root mean square difference of the profiles,
      relative to that of the wanted one.
    """
    t, gamma = np.array(steps, np.float64), np.array([exponent(w) for w in widths])
    wanted = (np.float64(step), exponent(width))
    products = _inner_product(t[:, None], gamma[:, None], t[None], gamma[None]) * step
    target = _inner_product(t, gamma, *wanted) * step
    norm = _inner_product(*wanted, *wanted) * step
    ones = np.ones((len(t), 1))
    system = np.block([[products, ones], [ones.T, np.zeros((1, 1))]])
    x = np.linalg.lstsq(system, np.append(target, 1.0), rcond=1e-13)[0][:-1]
    error = (x @ products @ x - 2 * x @ target + norm) / norm
    return x, float(np.sqrt(max(error, 0.0)))


def _inner_product(t_a, gamma_a, t_b, gamma_b):
    """Returns the integral over tau of p_a(tau) p_b(tau), which end at steps t_a and t_b."""
    t = np.minimum(t_a, t_b)
    shared = (t / t_a) ** gamma_a * (t / t_b) ** gamma_b * t / (t_a * t_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * shared
