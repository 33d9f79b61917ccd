"""Compares our attention with jax.nn.dot_product_attention, in one run.

    python -m benchmarks.attention --shapes=32x8,16x12 --batch_size=2

Measures the base model's attention, by default with half its heads, on this machine's device. At
each shape in --shapes (SIZExHEADS, with 64 channels per head; the model has 32x16 and 16x24) all
pixels attend to all pixels and 128 tokens. A forward pass and one with gradients take turns. The
table reports the median time and the temporary memory that XLA plans; parentheses show the factor
by which each is less than with JAX's attention. On a GPU in bfloat16, JAX's cuDNN implementation
has a row too.
"""

from __future__ import annotations

import functools
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.models.attention import attention

FLAGS = flags.FLAGS
TOKENS, HEAD_DIM = 128, 64
JAXS = "jax.nn"
KINDS = ("forward", "with gradients")


def define_flags() -> None:
    flags.DEFINE_list("shapes", ["32x8", "16x12"], "Image sizes and heads, SIZExHEADS.")
    flags.DEFINE_integer("batch_size", 2, "Images per call.", lower_bound=1)
    flags.DEFINE_integer("rounds", 9, "Number of times each program is timed.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", "bfloat16", ["float32", "bfloat16"], "Type of queries, keys, values."
    )
    flags.DEFINE_string("json", "", "File to write the figures to, as JSON.")


def main(argv: list[str]) -> None:
    """Measures every shape and prints a table in Markdown."""
    del argv
    found = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text) for text in FLAGS.shapes]
    if not all(found):
        raise UserError(f"--shapes is {','.join(FLAGS.shapes)}; allowed: SIZExHEADS, as in 32x8")
    shapes = [(int(match[1]), int(match[2])) for match in found]
    rows = [
        {"size": size, "heads": heads, "name": name, **figures}
        for size, heads in shapes
        for name, figures in measure(size, heads, FLAGS.batch_size, FLAGS.rounds).items()
    ]
    print(table(rows))
    if FLAGS.json:
        settings = {key: FLAGS[key].value for key in ("batch_size", "rounds", "dtype")}
        settings |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        text = json.dumps({"settings": settings, "rows": rows}, indent=2)
        Path(FLAGS.json).write_text(text + "\n")


def functions() -> dict[str, Callable[..., jax.Array]]:
    """Returns the attention functions (q, k, v, mask) -> output, by name."""

    def jaxs(q, k, v, mask, implementation=None):
        # cuDNN requires a mask row for every query.
        mask = jnp.broadcast_to(mask[:, None, None, :], (q.shape[0], 1, q.shape[1], k.shape[1]))
        return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)

    ways = {JAXS: jaxs, "ours": attention}
    if jax.default_backend() == "gpu" and FLAGS.dtype == "bfloat16":
        ways[f"{JAXS}, cuDNN"] = functools.partial(jaxs, implementation="cudnn")
    return ways


def programs(function: Callable[..., jax.Array]) -> dict[str, Callable[..., Any]]:
    """Returns the jitted functions of (q, k, v, mask, output gradient) to time."""

    def with_gradients(q, k, v, mask, g):
        out, pull = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
        return out, pull(g)

    forward = jax.jit(lambda q, k, v, mask, g: function(q, k, v, mask))
    return dict(zip(KINDS, (forward, jax.jit(with_gradients)), strict=True))


def measure(size: int, heads: int, batch: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Measures seconds and bytes of each function; the programs take turns."""
    keys = jax.random.split(jax.random.key(0), 4)
    lengths = [size**2, size**2 + TOKENS, size**2 + TOKENS, size**2]
    shapes = [(batch, length, heads, HEAD_DIM) for length in lengths]
    q, k, v, g = map(functools.partial(jax.random.normal, dtype=FLAGS.dtype), keys, shapes)
    mask = jnp.broadcast_to(jnp.arange(k.shape[1]) < k.shape[1] - TOKENS // 2, k.shape[:2])
    args = (q, k, v, mask, g)
    compiled = {
        (name, kind): program.lower(*args).compile()
        for name, function in functions().items()
        for kind, program in programs(function).items()
    }
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in compiled}
    for turn in range(rounds + 1):
        for key, program in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if turn:  # the first turn is a warm-up
                seconds[key].append(time.perf_counter() - start)
    results: dict[str, dict[str, Any]] = {name: {} for name, _ in compiled}
    for (name, kind), program in compiled.items():
        results[name][f"{kind}, s"] = seconds[name, kind]
        results[name][f"{kind}, bytes"] = program.memory_analysis().temp_size_in_bytes
    return results


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the rows in Markdown, each with its ratio to JAX's attention."""
    head = " | ".join(f"{kind}, ms | {kind}, temporary MiB" for kind in KINDS)
    lines = [f"| pixels, heads | attention | {head} |", "|---" * (2 + 2 * len(KINDS)) + "|"]
    bases = {(row["size"], row["heads"]): row for row in rows if row["name"] == JAXS}
    for row in rows:
        base = bases[row["size"], row["heads"]]
        cells = []
        for kind in KINDS:
            for unit, scale, middle in (("s", 1e3, statistics.median), ("bytes", 2**-20, float)):
                value, its = (scale * middle(r[f"{kind}, {unit}"]) for r in (row, base))
                ratio = "" if row is base else f" ({its / value:.2f})"
                cells.append(f"{value:.4g}{ratio}")
        where = f"{row['size']}x{row['size']}, {row['heads']}"
        lines.append(f"| {where} | {row['name']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
