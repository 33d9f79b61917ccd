"""A stage of a cascade with its weights."""

from __future__ import annotations

import dataclasses
from typing import Any

from imagen_jax.stage import Params, Stage


@dataclasses.dataclass(frozen=True)
class TrainedStage:
    """A stage with its EMA weights.

    Attributes:
      name: name in progress bars and messages, usually the workdir; unique in a cascade.
      step: checkpoint step of the weights.
      stage: the stage.
      params: the weights.
      ema: width of the average that the weights are; None for the EMA that training keeps.
      exported: what `runs.exported.read` says about an exported model; empty for a run.
    """

    name: str
    step: int
    stage: Stage
    params: Params
    ema: float | None = None
    exported: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        """Side of the images it samples, pixels."""
        return self.stage.config.full_size

    @property
    def low_res(self) -> int:
        """Side of the images it enlarges, pixels; 0 for a base model."""
        return self.size // self.stage.config.upscale if self.stage.config.unet.low_res else 0

    @property
    def average(self) -> str:
        """Which average the weights are, in words: "EMA, decay 0.9999", "EMA, width 0.1"."""
        if self.exported:
            return self.exported["average"]
        if self.ema is not None:
            return f"EMA, width {self.ema:g}"
        return f"EMA, decay {self.stage.config.ema_decay:g}"
