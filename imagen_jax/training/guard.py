"""Decides when a run whose losses or gradients are not finite goes back to a checkpoint.

Every decision depends only on the metrics of steps, which are the same on all hosts, and is made at
a step that is the same on all hosts. A resumed run repeats it.
"""

from __future__ import annotations

import math
from collections import Counter, deque

from imagen_jax.common.cli import log
from imagen_jax.common.errors import DIVERGED, RunError
from imagen_jax.sections import GuardConfig

# A spike is compared with this quantile of the last WINDOW losses, once there are LEAST.
QUANTILE, WINDOW, LEAST = 0.9, 200, 20


class Guard:
    """Counts the steps that were skipped.

    Attributes:
      skips: steps skipped in a row, up to the newest that was seen.
      diverged: whether the run has to go back.
    """

    def __init__(self, config: GuardConfig, delay: int):
        """Starts at a checkpoint.

        Args:
          delay: steps after which every host has seen the metrics of a step.
        """
        self._config, self._delay = config, delay
        self._places: Counter[int] = Counter()
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.restart()

    def restart(self) -> None:
        """Forgets the steps that were seen."""
        self.skips, self.diverged, self._decided = 0, False, 0

    @property
    def steady(self) -> bool:
        """Whether the newest step was taken and the run does not have to go back."""
        return not (self.skips or self.diverged)

    def see(self, step: int, skipped: bool, loss: float) -> bool:
        """Counts a step; steps come in order. Returns whether its loss is a spike.

        Spikes are counted from the start of this process, so a resumed run may miss some.
        """
        if skipped and not self.skips:
            log.warning("step %d  skipped: its loss or gradients are not finite", step)
        self.skips = self.skips + 1 if skipped else 0
        if self.skips > self._config.max_skips and not self.diverged:
            self.diverge(step)
        return not skipped and self._is_spike(loss)

    def _is_spike(self, loss: float) -> bool:
        factor, before = self._config.spike_factor, sorted(self._losses)
        self._losses.append(loss)
        high = before[int(QUANTILE * len(before))] if len(before) >= LEAST else math.inf
        return bool(factor) and loss > factor * high

    def diverge(self, step: int) -> None:
        """Makes the run go back, on account of `step`."""
        self.diverged, self._decided = True, step

    def decides(self, step: int) -> bool:
        """Returns whether the run goes back at `step`, when every host knows that it has to."""
        return self.diverged and step >= self._decided + self._delay

    def go_back(self, step: int, checkpoint: int) -> int:
        """Counts a return to a checkpoint; returns how many there were to this one.

        Args:
          step: the step that training had reached.
          checkpoint: the step of the checkpoint, 0 for the start.

        Raises:
          RunError: this is one more than config.guard.max_rollbacks.
        """
        self._places[checkpoint] += 1
        count, most = self._places[checkpoint], self._config.max_rollbacks
        if count > most:
            raise RunError(
                DIVERGED,
                f"training diverged at step {step}, after {most} returns to step {checkpoint}, "
                "each with other data; lower config.optimizer.learning_rate or set "
                "config.optimizer.grad_clip, and run again to resume from there",
            )
        log.warning(
            "step %d  diverged; going back to step %d, and on with the data after step %d "
            "(%d of %d times)",
            step, checkpoint, step, count, most,
        )  # fmt: skip
        self.restart()
        return count
