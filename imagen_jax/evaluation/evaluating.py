"""One evaluation: samples at every point of a sweep, metrics, and their protocols."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import imagen_jax
from imagen_jax.common.buckets import to_path
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import write_json
from imagen_jax.evaluation import losses, protocol, samples, sweep
from imagen_jax.evaluation.features import Hashed
from imagen_jax.evaluation.metric import Example, Metric, Table
from imagen_jax.evaluation.protocol import TRUE
from imagen_jax.evaluation.suites import Suite
from imagen_jax.evaluation.table import NEEDS
from imagen_jax.pipeline import cascade
from imagen_jax.pipeline.cascade import Cascade
from imagen_jax.pipeline.settings import PER_STAGE, SettingError, Settings, samplers
from imagen_jax.runs.checkpoint import newest_step
from imagen_jax.runs.posthoc import newest_snapshot
from imagen_jax.stage import load as load_stage

HEAVY = ("image", "text", "text_mask")  # fields of an example that are read when needed


class Column(NamedTuple):
    """The samples of a point.

    Attributes:
      images: uint8 [H, W, 3] each.
      protocol: how they were drawn.
      point: the settings.
    """

    images: Sequence[np.ndarray]
    protocol: dict[str, Any]
    point: sweep.Point


@dataclasses.dataclass
class Evaluation:
    """The runs, the prompts and the points of one evaluation.

    Attributes:
      workdirs: the runs of the cascade, in order.
      settings: what is swept.
      suite: the prompts.
      seed: seed of the first sample.
      out: folder of the results.
      step: checkpoint step; None for the newest.
      truncate: truncate prompts that are too long.
      parts: the text encoders whose embeddings the examples have.
    """

    workdirs: Sequence[Path]
    settings: sweep.Settings
    suite: Suite
    seed: int
    out: Path
    step: int | None = None
    truncate: bool = False
    parts: Sequence[Any] = ()

    def __post_init__(self):
        heavy = set(HEAVY)
        self.light: list[Example] = [
            {k: v for k, v in e.items() if k not in heavy} for e in self.suite.examples
        ]
        self.has_images = "image" in self.suite.examples[0]
        self.prompts = protocol.prompts_record(self.light, self.suite.record)

    @property
    def captions(self) -> list[str]:
        """The prompts."""
        return [e["caption"] for e in self.light]

    def common(self, size: int) -> dict[str, Any]:
        """Returns the part of the protocol that all columns share."""
        return {
            "prompts": self.prompts,
            "seeds": {"first": self.seed, "num": len(self.light)},
            "size": size,
            "code": protocol.code_record(),
        }

    def load(self) -> Cascade:
        """Loads the cascade with the weights of the first point.

        Raises:
          UserError: a run or a checkpoint is missing, or the runs do not form a cascade.
        """
        first = next(iter(self.settings.get("ema", [sweep.KEPT])))
        try:
            loaded = cascade.load(*self.workdirs, step=self.step, ema=_widths(first))
        except SettingError as e:
            raise UserError(f"--{e}") from e
        encoders = None
        if self.parts:
            encoders = samples.encoders(self.suite.examples, self.captions, self.parts)
        return Cascade(loaded.stages, encoders)

    def columns(self, pipe: Cascade) -> dict[str, Column]:
        """Draws the samples of all points, or finds those that an interrupted call has drawn."""
        points = {sweep.name_of(p, self.settings): p for p in sweep.points(self.settings)}
        drawn = {name: self._samplers(pipe, point) for name, point in points.items()}
        found = {}
        for name, point in points.items():
            pipe = self._with_weights(pipe, _widths(point.get("ema", sweep.KEPT)))
            true = self._true_low_res(pipe, point)
            stages = [
                protocol.stage_record(stage, sampler)
                for stage, sampler in zip(pipe.stages, drawn[name], strict=True)
                if stage.low_res or not true
            ]
            record = {"stages": stages, "low_res": "true" if true else "drawn"}
            source = {k: self.prompts.get(k) for k in ("suite", "task", "split", "sha256")}
            code = imagen_jax.__version__
            images = samples.draw(
                pipe,
                drawn[name],
                self.suite.examples,
                self.captions,
                seed=self.seed,
                true_low_res=true,
                truncate=self.truncate,
                record={**record, "prompts": source, "seed": self.seed, "imagen_jax": code},
                folder=self.out / "samples",
                name=name,
            )
            found[name] = Column(Hashed(images), protocol.plain(record), point)
        return found

    def _samplers(self, pipe: Cascade, point: sweep.Point) -> list[Any]:
        values = {k: v.split("/") for k, v in point.items() if k in PER_STAGE}
        self._true_low_res(pipe, point)  # raises
        try:
            return samplers(Settings(**values), [s.stage.config for s in pipe.stages])
        except SettingError as e:
            raise UserError(f"--sweep: {e}") from e

    def _true_low_res(self, pipe: Cascade, point: sweep.Point) -> bool:
        """Returns whether super-resolution starts from the true images."""
        first, wanted = pipe.stages[0], point.get("low_res")
        if not first.low_res and wanted != "true":
            return False
        if first.low_res and wanted == "drawn":
            raise UserError("--sweep=low_res:drawn needs a base model as the first --workdir")
        if not any(stage.low_res for stage in pipe.stages):
            raise UserError("--sweep=low_res:true needs a super-resolution run in --workdir")
        if not self.has_images:
            raise UserError(
                f"--workdir={first.name} enlarges true images, and these prompts have none; leave "
                "out --prompts, or put a base model first"
            )
        return True

    def _with_weights(self, pipe: Cascade, widths: list[float | None]) -> Cascade:
        """Returns the cascade with averages of other widths; its compiled programs stay."""
        stages = []
        for i, stage in enumerate(pipe.stages):
            workdir, width = to_path(stage.name), widths[i % len(widths)]
            if width != stage.ema:
                newest = newest_step if width is None else newest_snapshot
                step = newest(workdir) if self.step is None else self.step
                _, params = load_stage(workdir, step, width)
                stage = dataclasses.replace(stage, params=params, step=step, ema=width)
            stages.append(stage)
        pipe.stages[:] = stages
        return pipe

    def measure(
        self, columns: Mapping[str, Column], metrics: Mapping[str, Metric]
    ) -> dict[str, dict[str, Table]]:
        """Returns metric -> column -> Table. Checks also measure the true images, if there are."""
        found: dict[str, dict[str, Table]] = {}
        for name, metric in metrics.items():
            found[name] = {}
            for column, images in self._measured(columns, name in NEEDS):
                log.info("%s: %s", name, column)
                found[name][column] = metric.measure(images, self.suite.examples)
        return found

    def _measured(
        self, columns: Mapping[str, Column], true: bool
    ) -> Iterator[tuple[str, Sequence[np.ndarray]]]:
        yield from ((name, column.images) for name, column in columns.items())
        if true and self.has_images:
            yield TRUE, samples.field(self.suite.examples, "image")

    def losses(
        self, pipe: Cascade, examples_of: Callable[[Any], Sequence[Example]]
    ) -> tuple[dict[str, Table], dict[str, dict[str, Any]]]:
        """Measures the held-out loss of every stage and width.

        Args:
          examples_of: config -> held-out examples at the size of its network.

        Returns:
          The tables and the protocols by column: the run's name, with the width if it is swept.
        """
        tables, records = {}, {}
        for ema in self.settings.get("ema", [sweep.KEPT]):
            pipe = self._with_weights(pipe, _widths(ema))
            for stage in pipe.stages:
                width = "" if ema == sweep.KEPT else f", EMA {stage.ema:g}"
                name = f"{Path(stage.name).name}{width}"
                examples = examples_of(stage.stage.config)
                tables[name] = losses.measure(stage.stage, stage.params, examples, self.seed)
                record = protocol.stage_record(stage, stage.stage.config.sampling)
                record["size"] = stage.stage.config.unet.image_size
                del record["sampling"]
                records[name] = {"stages": [protocol.plain(record)]}
        return tables, records

    def write(
        self,
        name: str,
        metric: Metric,
        tables: Mapping[str, Table],
        protocols: Mapping[str, Any],
        size: int,
    ) -> dict[str, Any]:
        """Writes <metric>.json with its protocol; returns the shared part of the protocol."""
        common = {**self.common(size), "metric": protocol.plain(dict(metric.protocol))}
        columns = {
            column: {"protocol": protocols.get(column, {}), "table": table}
            for column, table in tables.items()
        }
        write_json(
            self.out / f"{name}.json", {"metric": name, "protocol": common, "columns": columns}
        )
        return common


def _widths(value: str) -> list[float | None]:
    return [None if word == sweep.KEPT else float(word) for word in value.split("/")]
