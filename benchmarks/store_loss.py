"""What a store's number format costs: the held-out diffusion loss with embeddings of each store.

    python -m data_pipelines.encode_text --dataset=scenes/32 --max_tokens=64 --out=stores/bfloat16
    python -m data_pipelines.encode_text --dataset=scenes/32 --max_tokens=64 --out=stores/int8 \\
        --dtype=int8
    python -m benchmarks.store_loss --workdir=runs/demo --stores=stores/bfloat16,stores/int8

The same weights, images and noise every time. The last row has no caption, the null prompt of
guidance: what there is to lose.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
from absl import flags

from imagen_jax import cli, experiment
from imagen_jax.errors import UserError

FLAGS = flags.FLAGS


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "A run of imagen_jax.train.")
    flags.DEFINE_list("stores", None, "Folders that data_pipelines.encode_text wrote.")
    flags.DEFINE_integer("batches", 32, "Batches of the evaluation split.", lower_bound=1)


def main(argv: list[str]) -> None:
    """Measures, prints a table in Markdown."""
    del argv
    if not FLAGS.workdir or not FLAGS.stores:
        raise UserError("--workdir=DIR and --stores=DIR,DIR are both needed (see --help)")
    with cli.quiet_imports():
        from imagen_jax import data
    built, params = experiment.load(Path(FLAGS.workdir).absolute())
    config = dataclasses.replace(built.config, eval_batches=FLAGS.batches)
    losses = {}
    for store in FLAGS.stores:
        section = dataclasses.replace(config.data, embeddings=str(Path(store).absolute()))
        batches = data.eval_batches(dataclasses.replace(config, data=section))
        losses[store] = built.held_out_loss(params, batches)
    null = [{**b, **{k: np.zeros_like(b[k]) for k in ("text", "text_mask")}} for b in batches]
    losses["no caption"] = built.held_out_loss(params, null)
    print(_table(losses))


def _table(losses: dict[str, float]) -> str:
    first = next(iter(losses.values()))
    lines = ["| embeddings | held-out loss | change |", "|---|---|---|"]
    for name, loss in losses.items():
        lines.append(f"| {name} | {loss:.6f} | {loss / first - 1:+.4%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
