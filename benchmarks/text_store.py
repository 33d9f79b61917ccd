"""Measures what an embedding store saves (padding, bytes) and what int8 costs in loss.

    python -m benchmarks.text_store --workdir=runs/demo

First, the benchmark encodes captions of held-out scenes in two ways, alternating: in batches of
similar length, as a store does, and padded to a single length. Then it measures the held-out loss
of a trained model with the embeddings as encoded and as read back from each number format. The
noise is the same, so only the embeddings change the loss. The loss without text is the reference.
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
    flags.DEFINE_string("workdir", None, "Directory of a run of imagen_jax.train.")
    flags.DEFINE_integer("captions", 512, "Number of held-out captions to encode.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Number of timed rounds per way of batching.", lower_bound=1)
    flags.DEFINE_integer(
        "batches", 32, f"Number of batches of {BATCH} for the loss.", lower_bound=2
    )


def main(argv: list[str]) -> None:
    """Prints two Markdown tables."""
    del argv
    if not FLAGS.workdir:
        raise UserError("--workdir is not set; pass the directory of a run (see --help)")
    stage, params = load(Path(FLAGS.workdir).absolute())
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    config = dataclasses.replace(stage.config, batch_size=BATCH, eval_batches=FLAGS.batches)
    rows = Reader(config).examples(config.data.sample_split, FLAGS.captions)
    captions = list(dict.fromkeys(row["caption"] for row in rows))
    print("| encoder | batches | tokens/s | padding |\n|---|---|---|---|")
    for part in config.text.parts:
        loaded = load_encoder(part.encoder, part.max_tokens)
        for name, (rate, padding) in speeds(loaded, captions, FLAGS.rounds).items():
            print(f"| {part.encoder} | {name} | {rate:,.0f} | {padding:.0%} |", flush=True)
    print("\n| embeddings | held-out loss | change | standard error |\n|---|---|---|---|")
    for name, row in losses(stage, params, Reader(config).eval_batches()).items():
        print(f"| {name} | {row.loss:.6f} | {row.change:+.2e} | {row.error:.1e} |")


def speeds(
    text_encoder: TextEncoder, captions: Sequence[str], rounds: int
) -> dict[str, tuple[float, float]]:
    """Returns tokens per second (median of all rounds) and the share of padding of both ways."""
    longest = max(map(text_encoder.num_tokens, captions))
    ways = {
        "by length": contextlib.nullcontext(),
        f"padded to {longest}": mock.patch.object(encoder, "_bucket", lambda _: longest),
    }
    seconds, padding = {name: [] for name in ways}, {}
    for number in range(rounds + 1):  # the first round compiles
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
    """Mean loss, and its difference from the loss with the embeddings as encoded."""

    loss: float
    change: float
    error: float


def losses(stage: Stage, params: Any, batches: Sequence[dict[str, np.ndarray]]) -> dict[str, Row]:
    """Returns the loss with embeddings from each number format, and without text."""
    ways = {"as encoded": batches}
    ways |= {f"from {n}": [stored(batch, form) for batch in batches] for n, form in FORMS.items()}
    ways["none"] = [jax.device_get(no_text(batch)) for batch in batches]
    rows, expected = {}, None
    for name, changed in ways.items():
        found = [stage.held_out_losses(params, [batch]) for batch in changed]
        values = np.array([losses["eval_loss"] for losses in found])
        expected = values if expected is None else expected
        change = values - expected
        rows[name] = Row(values.mean(), change.mean(), change.std(ddof=1) / len(change) ** 0.5)
    return rows


def stored(batch: dict[str, np.ndarray], form: Form) -> dict[str, np.ndarray]:
    """Returns a batch with its embeddings packed and unpacked."""
    text = batch["text"]
    tokens = text.reshape(-1, text.shape[-1])
    return {**batch, "text": form.unpack(form.pack(tokens), text.shape[-1]).reshape(text.shape)}


def no_text(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Returns a batch with the null prompt."""
    return drop_text(batch, np.ones(len(batch["text"]), bool))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
