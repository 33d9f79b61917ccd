"""The model card: what the weights are, what they were trained on, how well they do, and limits.

It states only what the run, its evaluation and its dataset record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from imagen_jax.common.buckets import to_path
from imagen_jax.common.cli import log
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import read_json
from imagen_jax.config import Config
from imagen_jax.exporting import usage
from imagen_jax.pipeline.trained import TrainedStage
from imagen_jax.runs import workdir as runs

BUNDLED = ("byte-tiny",)  # text encoders that need no download
NO_RESULTS = "No evaluation was found beside the weights, so nothing is known about their quality."


class Data(NamedTuple):
    """What is known about the training data: rows of a table, and known risks."""

    rows: list[tuple[str, str]]
    risks: list[str]


class Card(NamedTuple):
    """What the card of a stage states; `config` and `record` are the exported config and record."""

    stage: TrainedStage
    config: Config
    record: dict[str, Any]
    license: str
    data: Data


def of_stage(card: Card) -> str:
    """Returns the model card of a stage, in Markdown."""
    stage = card.stage
    parts = [_front_matter(card.license), f"# {card.record['source']}", "", _summary(stage), ""]
    parts += ["## Use", "", usage.of_stage(card.record["format"], stage), ""]
    parts += ["## Model", "", *_table(("", ""), _model(card)), ""]
    parts += ["## Training data", "", *_table(("", ""), card.data.rows), ""]
    parts += ["## Results", "", *(_results(card) or [NO_RESULTS]), ""]
    parts += ["## Limits", "", *(f"- {limit}" for limit in _limits(card)), ""]
    parts += ["## Configuration", "", f"`{runs.CONFIG}` has every key. Sampling defaults:", ""]
    sampling = card.config.sampling
    header = ("sampler", "steps", "guidance", "threshold")
    guidance = f"{sampling.guidance_weight:g}"
    row = (sampling.name, str(sampling.num_steps), guidance, sampling.threshold)
    parts += _table(header, [row])
    return "\n".join(parts) + "\n"


def of_cascade(names: Sequence[str], cards: Sequence[Card]) -> str:
    """Returns the card of a cascade: its stages, in order, and how to sample with all of them.

    Args:
      names: the folders of the stages.
    """
    rows = [
        (f"[{name}]({name}/{runs.CARD})", _summary(card.stage), f"{card.record['parameters']:,}")
        for name, card in zip(names, cards, strict=True)
    ]
    parts = [_front_matter(cards[0].license), "# Cascade", ""]
    parts += ["Each stage enlarges the images of the stage before it.", ""]
    parts += [*_table(("folder", "stage", "parameters"), rows), ""]
    return "\n".join([*parts, "## Use", "", usage.of_cascade(cards[0].record["format"]), ""])


def _front_matter(license_name: str) -> str:
    """Returns the metadata that model hubs read."""
    lines = ["library_name: imagen_jax", "pipeline_tag: text-to-image"]
    lines += [f"license: {json.dumps(license_name.lower())}"] if license_name else []
    return "\n".join(["---", *lines, "---", ""])


def _summary(stage: TrainedStage) -> str:
    if stage.low_res:
        return f"Super-resolution from {stage.low_res} to {stage.size} pixels, guided by a prompt."
    return f"Draws images of {stage.size} pixels from a prompt."


def _model(card: Card) -> list[tuple[str, str]]:
    record, config = card.record, card.config
    network, text = config.model.get("name", "unet"), config.text
    seen = record["step"] * config.batch_size
    encoders = ", ".join(f"{p.encoder} (up to {p.max_tokens} tokens)" for p in text.parts)
    return [
        ("network", f"{network}, {record['parameters']:,} parameters"),
        ("text encoder", encoders),
        ("predicts", f"{config.diffusion.prediction}, {config.diffusion.schedule} schedule"),
        ("trained for", f"{record['step']:,} steps of {config.batch_size}: {seen:,} images"),
        ("average of weights", record["average"]),
        ("stored as", record["dtype"]),
        ("license", card.license or "not stated"),
        ("exported by", f"imagen_jax {record['code']}"),
        *([("SHA-256", f"`{record['sha256']}`")] if "sha256" in record else []),
    ]


def _limits(card: Card) -> list[str]:
    config, step = card.config, card.record["step"]
    limits = [
        "It draws only what its data show; prompts about anything else give arbitrary images.",
        "Nothing filters prompts or images, and images carry no watermark.",
    ]
    if config.data.categories:
        limits.append(f"It saw only captions of: {', '.join(config.data.categories)}.")
    needed = [p.encoder for p in config.text.parts if p.encoder not in BUNDLED]
    if needed:
        limits.append(f"It needs the text encoder {' and '.join(needed)}, which is not included.")
    if card.stage.low_res:
        limits.append(f"It enlarges images of {card.stage.low_res} pixels; it draws none itself.")
    if step < config.num_steps:
        limits.append(f"Its training had not ended: step {step:,} of {config.num_steps:,}.")
    return limits + card.data.risks


def _results(card: Card) -> list[str]:
    """Returns the figures of these weights in the evaluation of the folder that they come from."""
    stage = card.stage
    folder, parts = to_path(stage.name), []
    losses = [m for m in runs.read_metrics(folder) if "eval_loss" in m and m["step"] <= stage.step]
    if losses:
        last = losses[-1]
        parts += [f"Held-out loss at step {last['step']:,}: {last['eval_loss']:.4f}.", ""]
    for path in sorted((folder / runs.EVALUATION).glob("*.json")):
        try:
            found = read_json(path)
        except UserError as e:
            log.warning("the model card leaves out %s", e)
            continue
        rows = list(_figures(found, card))
        if rows:
            parts += [f"### {path.stem}", "", *_table(("", "figures"), rows), ""]
    return parts[:-1]


def _figures(found: dict[str, Any], card: Card) -> list[tuple[str, str]]:
    """Returns what a result was measured on, and the figures of all prompts in each column.

    Columns of another step or average are left out. Results of earlier versions, which have no
    protocol, do not say which they are of.
    """
    columns = found.get("columns") or {
        f"guidance {name}" if name[:1].isdigit() else name: {"table": table}
        for name, table in found.get("guidance", {}).items()
    }
    rows = [
        (name, _numbers(column["table"].get("all", {})))
        for name, column in columns.items()
        if _is_of(column.get("protocol", {}).get("stages", []), card)
    ]
    protocol = _protocol(found.get("protocol") or {"prompts": found})
    return [("protocol", protocol), *rows] if rows else []


def _is_of(stages: Iterable[dict[str, Any]], card: Card) -> bool:
    """Returns whether the stages of a result, if they include this one, have these weights."""
    own = (card.record["step"], card.record["average"])
    name = Path(card.stage.name).name
    return all((s["step"], s["weights"]) == own for s in stages if s["run"] == name)


def _protocol(fields: dict[str, Any]) -> str:
    """Returns the main fields of a protocol in words; the file of the result has all of them."""
    prompts, seeds = fields.get("prompts", {}), fields.get("seeds", {})
    words = [f"{key} {prompts[key]}" for key in ("suite", "task", "split") if key in prompts]
    words += [f"{prompts['num']} prompts"] if "num" in prompts else []
    words += [f"prompts' SHA-256 {prompts['sha256'][:12]}"] if "sha256" in prompts else []
    words += [f"seeds from {seeds['first']}"] if "first" in seeds else []
    words += [f"{fields['size']} pixels"] if "size" in fields else []
    return ", ".join(words)


def _numbers(row: dict[str, Any]) -> str:
    plain = {k: v for k, v in row.items() if isinstance(v, (int, float)) and v is not True}
    return ", ".join(f"{name} {value:.4g}" for name, value in plain.items())


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells):
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    return [line(header), line(["---"] * len(header)), *map(line, rows)]
