"""The protocol of a result: everything that its figures depend on. Compares results of equal ones.

The same model gets another FID by another set of prompts, resize filter or number of samples. A
result therefore carries its protocol, and two results are compared only if the protocols agree.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from imagen_jax.common.buckets import to_path
from imagen_jax.common.errors import UserError
from imagen_jax.common.files import read_json, sha256
from imagen_jax.common.version import code_version
from imagen_jax.evaluation.metric import Example, Row, value_of
from imagen_jax.runs import workdir as runs

if TYPE_CHECKING:
    from imagen_jax.diffusion.sampler import SamplerConfig
    from imagen_jax.pipeline.trained import TrainedStage

TRUE = "true images"  # the column of the examples' own images
# What two results may differ in: the model that is compared, and what changes no figure.
COMPARED = ("run", "step", "checksums_sha256")
FREE = ("code", "prompts.file", "prompts.file_sha256", "seeds.first")
# Settings of a sampler that change memory and speed only.
NO_EFFECT = ("guidance_batched",)


def prompts_record(examples: Sequence[Example], record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the record of a suite: its source, the prompts' hash, number and ids."""
    ids = [e["id"] for e in examples]
    lines = "".join(f"{json.dumps([e['id'], e['caption']])}\n" for e in examples)
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return {**record, "num": len(ids), "sha256": digest, "ids": ids}


def stage_record(stage: TrainedStage, sampler: SamplerConfig) -> dict[str, Any]:
    """Returns the record of a stage: its weights, and how it samples."""
    unused = NO_EFFECT if stage.low_res else (*NO_EFFECT, "aug_level")
    settings = {k: v for k, v in dataclasses.asdict(sampler).items() if k not in unused}
    return {
        "run": Path(stage.name).name,
        "step": stage.step,
        "checksums_sha256": _digest(stage),
        "weights": stage.average,
        "size": stage.size,
        "sampling": settings,
    }


def _digest(stage: TrainedStage) -> str:
    """Returns the hash of the weights' file, or of the checksums of their checkpoint."""
    from imagen_jax.runs.checksums import CHECKSUMS

    if stage.exported:
        return stage.exported["sha256"]
    kept = runs.CHECKPOINTS if stage.ema is None else runs.SNAPSHOTS
    sums = to_path(stage.name) / kept / f"step_{stage.step}" / CHECKSUMS
    return sha256([sums]) if sums.exists() else ""


def code_record() -> dict[str, str]:
    """Returns the versions of this code and of JAX."""
    import jax

    return {"imagen_jax": code_version(), "jax": jax.__version__}


def plain(value: Any) -> Any:
    """Returns a value as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(value))


def differences(a: Any, b: Any, prefix: str = "") -> list[str]:
    """Returns the dotted names of the fields in which two protocols differ, with both values."""
    name = prefix.rstrip(".")
    if name in FREE or name.rpartition(".")[2] in COMPARED:
        return []
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        keys = list(dict.fromkeys([*a, *b]))
        return [d for k in keys for d in differences(a.get(k), b.get(k), f"{prefix}{k}.")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        nested = any(isinstance(v, Mapping) for v in (*a, *b))
        if nested:
            pairs = enumerate(zip(a, b, strict=True))
            return [d for i, (x, y) in pairs for d in differences(x, y, f"{prefix}{i}.")]
    return [] if a == b else [f"{name} ({_short(a)}, {_short(b)})"]


def _short(value: Any) -> str:
    text = f"{len(value)} values" if isinstance(value, list) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


def compare(first: Path, second: Path) -> list[str]:
    """Compares two results; returns one line for each column and group.

    Raises:
      UserError: a file is no result, or their protocols differ.
    """
    a, b = (_result(path) for path in (first, second))
    if a["metric"] != b["metric"]:
        raise UserError(f"--compare: {first} has {a['metric']}, {second} has {b['metric']}")
    lines = []
    for name, x, y in _pairs(a["columns"], b["columns"], first, second):
        full = [{**r["protocol"], **c["protocol"]} for r, c in ((a, x), (b, y))]
        if found := differences(*full):
            raise UserError(
                f"--compare: the protocols of {first} and {second} differ in {', '.join(found)}"
            )
        paired = full[0]["seeds"] == full[1]["seeds"]
        lines += _lines(name, a["metric"], x["table"], y["table"], paired)
    return lines


def _result(path: Path) -> dict[str, Any]:
    result = read_json(path)
    if not {"metric", "protocol", "columns"} <= result.keys():
        raise UserError(f"--compare: {path} is not a result of imagen_jax.evaluate")
    return result


def _pairs(
    a: Mapping[str, Any], b: Mapping[str, Any], first: Path, second: Path
) -> Iterator[tuple[str, Any, Any]]:
    """Yields the columns of both results: those of the same name, or the only one of each."""
    a, b = ({k: v for k, v in c.items() if k != TRUE} for c in (a, b))
    common = [k for k in a if k in b]
    if not common and len(a) == len(b) == 1:
        common = [""]
        a, b = {"": next(iter(a.values()))}, {"": next(iter(b.values()))}
    if not common:
        raise UserError(
            f"--compare: {first} has the columns {', '.join(a)}; {second} has {', '.join(b)}; "
            "none is in both"
        )
    yield from ((k, a[k], b[k]) for k in common)


def _lines(
    column: str, metric: str, a: Mapping[str, Row], b: Mapping[str, Row], paired: bool
) -> list[str]:
    lines = []
    for group in (g for g in a if g in b):
        key, x = value_of(a[group])
        y = b[group][key]
        low, high, how = interval(a[group], b[group], paired)
        where = ", ".join(filter(None, (column, group)))
        bounds = f" ({low:+.4f} to {high:+.4f}; {how})" if math.isfinite(low) else f" ({how})"
        name = metric if key == "value" else key
        lines.append(f"{where}: {name} {x:.4f} and {y:.4f}, difference {y - x:+.4f}{bounds}")
    return lines


def interval(a: Row, b: Row, paired: bool) -> tuple[float, float, str]:
    """Returns the 95% interval of the difference b - a of two values, and how it was found.

    With the scores of the same prompts and seeds, it is the mean difference of the pairs with 1.96
    standard errors. Otherwise it combines the intervals of both values (Newcombe 1998, method 10;
    Zou and Donner 2008). NaN without intervals.
    """
    key, x = value_of(a)
    y = b[key]
    scores = a.get("scores"), b.get("scores")
    if paired and all(scores) and len(scores[0]) == len(scores[1]) > 1:
        pairs = np.subtract(scores[1], scores[0])
        error = float(np.std(pairs, ddof=1)) / math.sqrt(len(pairs))
        middle = float(np.mean(pairs))
        how = f"95%, {len(pairs)} pairs, standard error {error:.4f}"
        return middle - 1.96 * error, middle + 1.96 * error, how
    if not all({"low", "high"} <= row.keys() for row in (a, b)):
        return math.nan, math.nan, "no interval"
    down = math.hypot(y - b["low"], a["high"] - x)
    up = math.hypot(b["high"] - y, x - a["low"])
    return y - x - down, y - x + up, "95%, unpaired"
