"""What a store of embeddings saves, and what that costs: batches by length, and numbers as int8.

    python -m benchmarks.text_store --workdir=runs/demo

The captions of held-out scenes are encoded in batches by length, as a store's are, and padded to
one length, in turns. Then the held-out loss of a trained model is measured with embeddings as
encoded and as each form of a store gives them back; noise is the same, so losses differ by nothing
else. How much the text is worth at all, the loss without it, is there to compare with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from absl import flags

from data_pipelines.embeddings.store import FORMS, Form
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.diffusion.conditioning import drop_text
from imagen_jax.stage import Stage, load
from imagen_jax.text import TextEncoder, encoder, load_encoder

FLAGS = flags.FLAGS
BATCH = 32


def define_flags() -> None:
    flags.DEFINE_string("workdir", None, "A run of imagen_jax.train.")
    flags.DEFINE_integer("captions", 512, "Held-out captions that are encoded.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "How often, each way.", lower_bound=1)
    flags.DEFINE_integer("batches", 32, f"Batches of {BATCH} for the loss.", lower_bound=2)


def main(argv: list[str]) -> None:
    """Measures, prints two tables in Markdown."""
    del argv
    if not FLAGS.workdir:
        raise UserError("--workdir=DIR is needed (see --help)")
    stage, params = load(Path(FLAGS.workdir).absolute())
    with cli.quiet_imports():
        from data_pipelines.reading.batches import Reader

    config = dataclasses.replace(stage.config, batch_size=BATCH, eval_batches=FLAGS.batches)
    rows = Reader(config).examples(config.data.sample_split, FLAGS.captions)
    captions = list(dict.fromkeys(row["caption"] for row in rows))
    print("| encoder | batches | tokens a second | padding |\n|---|---|---|---|")
    for part in config.text.parts:
        loaded = load_encoder(part.encoder, part.max_tokens)
        for name, (rate, padding) in speeds(loaded, captions, FLAGS.rounds).items():
            print(f"| {part.encoder} | {name} | {rate:,.0f} | {padding:.0%} |", flush=True)
    print("\n| embeddings | held-out loss | change | its standard error |\n|---|---|---|---|")
    for name, row in losses(stage, params, Reader(config).eval_batches()).items():
        print(f"| {name} | {row.loss:.6f} | {row.change:+.2e} | {row.error:.1e} |")


def speeds(
    text_encoder: TextEncoder, captions: Sequence[str], rounds: int
) -> dict[str, tuple[float, float]]:
    """Tokens a second (the median of all rounds), and the share of padding, of both ways."""
    longest = max(map(text_encoder.num_tokens, captions))
    ways = {
        "by length": contextlib.nullcontext(),
        f"of {longest}, the longest": mock.patch.object(encoder, "_bucket", lambda _: longest),
    }
    seconds, padding = {name: [] for name in ways}, {}
    for number in range(rounds + 1):  # the first compiles
        for name, way in ways.items():
            with way:
                start = time.perf_counter()
                batches = list(text_encoder.batches(captions))
                taken = time.perf_counter() - start
            tokens = sum(len(e) for batch in batches for e in batch.embeddings.values())
            padding[name] = 1 - tokens / sum(batch.positions for batch in batches)
            seconds[name] += [taken] if number else []
    return {name: (tokens / statistics.median(seconds[name]), padding[name]) for name in ways}


class Row(NamedTuple):
    """The mean loss, and how much more it is than that of the embeddings as encoded."""

    loss: float
    change: float
    error: float


def losses(stage: Stage, params: Any, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, Row]:
    """Of embeddings from each form of store, and of none."""
    ways = {"as encoded": batches}
    ways |= {f"from {n}": [stored(batch, form) for batch in batches] for n, form in FORMS.items()}
    ways["none"] = [jax.device_get(no_text(batch)) for batch in batches]
    rows, expected = {}, None
    for name, changed in ways.items():
        found = np.array([stage.held_out_loss(params, [batch]) for batch in changed])
        expected = found if expected is None else expected
        change = found - expected
        rows[name] = Row(found.mean(), change.mean(), change.std(ddof=1) / len(change) ** 0.5)
    return rows


def stored(batch: dict[str, np.ndarray], form: Form) -> dict[str, np.ndarray]:
    """A batch whose embeddings were in a store."""
    text = batch["text"]
    tokens = text.reshape(-1, text.shape[-1])
    return {**batch, "text": form.unpack(form.pack(tokens), text.shape[-1]).reshape(text.shape)}


def no_text(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch with the null prompt."""
    return drop_text(batch, np.ones(len(batch["text"]), bool))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
