"""The folder of an export: one stage, or a folder per stage and what joins them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

from imagen_jax.common.cli import log
from imagen_jax.common.files import write_json, write_text
from imagen_jax.common.version import code_version
from imagen_jax.config import Config
from imagen_jax.diffusion.sampler import SamplerConfig
from imagen_jax.exporting import card
from imagen_jax.pipeline.trained import TrainedStage
from imagen_jax.runs import exported
from imagen_jax.runs import workdir as runs

# Writes the files of a format, apart from those that all formats have.
Writer = Callable[[Path, TrainedStage, SamplerConfig], None]


@dataclasses.dataclass(frozen=True)
class Export:
    """What to export.

    Attributes:
      stages: the stages, in order.
      samplers: the sampler of each; its settings become the defaults in the config.
      format: name of the format, for the record.
      write: writes its files.
      dtype: type of the weights in the files.
      raw: whether the weights are no average.
      license: SPDX identifier of the license of the weights; "" if there is none to state.
      describe_data: config -> what is known about the training data.
    """

    stages: Sequence[TrainedStage]
    samplers: Sequence[SamplerConfig]
    format: str
    write: Writer
    dtype: str
    raw: bool
    license: str
    describe_data: Callable[[Config], card.Data]


def write(folder: Path, export: Export) -> None:
    """Fills an empty folder with an export, and a card for each stage and for the cascade."""
    if len(export.stages) == 1:
        _write_stage(folder, export, 0)
        return
    names = [f"{i}_{stage.size}" for i, stage in enumerate(export.stages, start=1)]
    cards = []
    for i, name in enumerate(names):
        (folder / name).mkdir()
        cards.append(_write_stage(folder / name, export, i))
    write_json(folder / runs.CASCADE, {"stages": names})
    write_text(folder / runs.CARD, card.of_cascade(names, cards))


def average_of(stage: TrainedStage, raw: bool) -> str:
    """Returns in words which average the weights of a stage are."""
    return "none" if raw and not stage.exported else stage.average


def _complete(config: Config) -> Config:
    """Returns the config with every key of the section `model`, for readers without this code."""
    derived = ("text_dim", "text_parts", "pooling", "sequence", "head")
    fields = {k: v for k, v in dataclasses.asdict(config.unet).items() if k not in derived}
    return dataclasses.replace(config, model={"name": config.model.get("name", "unet"), **fields})


def _write_stage(folder: Path, export: Export, index: int) -> card.Card:
    stage, sampler = export.stages[index], export.samplers[index]
    config = _complete(dataclasses.replace(stage.stage.config, sampling=sampler))
    log.info("%s: writing %s", stage.name, export.format)
    export.write(folder, stage, sampler)
    runs.write_config(folder, config)
    fields = {
        "format": export.format,
        "source": stage.exported.get("source", Path(stage.name).absolute().name),
        "step": stage.step,
        "average": average_of(stage, export.raw),
        "dtype": export.dtype,
        "parameters": stage.stage.num_params,
        "code": code_version(),
    }
    record = exported.write_record(folder, fields)
    described = card.Card(stage, config, record, export.license, export.describe_data(config))
    write_text(folder / runs.CARD, card.of_stage(described))
    return described
