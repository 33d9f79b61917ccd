"""Published figures, beside which the report puts those of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_jax.common import html
from imagen_jax.evaluation.metric import Table, total, value_of
from imagen_jax.evaluation.protocol import TRUE


def fid_section(name: str, tables: Mapping[str, Table], protocol: Mapping[str, Any]) -> list[str]:
    """Returns the part of the report with the FIDs of table 1 and those of a run.

    Args:
      name: name of the run.
      tables: the run's FID by column.
      protocol: of the result.
    """
    found = json.loads((Path(__file__).parent / "published.json").read_text())["fid_30k"]
    rows = [
        (r["model"], f"{r['fid']:.2f}", "zero-shot" if r["zero_shot"] else "trained on COCO")
        for r in found["rows"]
    ]
    wanted = found["protocol"]
    here = {k: protocol["prompts"].get(k) for k in ("suite", "num")} | {"size": protocol["size"]}
    other = [f"{k} {here[k]} instead of {wanted[k]}" for k in wanted if here[k] != wanted[k]]
    remark = f"does not compare: {', '.join(other)}" if other else "this run"
    for column, table in tables.items():
        if column != TRUE:
            _, value = value_of(total(table))
            rows.append((f"{name}, {column}", f"{value:.2f}", remark))
    return [
        html.element("h2", "Beside published figures"),
        html.table(("model", "FID", ""), rows),
        html.element("p", f"{found['title']}; DeepFloyd's own figure for IF-XL."),
    ]
