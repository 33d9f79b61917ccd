"""Compares the Efficient U-Net with the ordinary one, and scanned with unrolled blocks, in one run.

    python -m benchmarks.efficient_unet --json=efficient_unet.json

The first table compares networks of nearly equal parameter counts on the same task, 4x
super-resolution. It reports the time of a forward pass and of a training step (loss and gradient,
without the optimizer) and the temporary memory that XLA plans. The programs take turns, so that a
change in the machine's load affects all of them. Parentheses show the factor by which a network
takes less than the ordinary one. The second table reports the time to compile a training step as
the number of equal blocks grows.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.models.efficient_unet import EfficientUNet, EfficientUNetConfig
from imagen_jax.models.networks import Functional, functional
from imagen_jax.models.unet import UNet, UNetConfig

FLAGS = flags.FLAGS
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TOKENS, TEXT_DIM = 16, 64


def define_flags() -> None:
    flags.DEFINE_integer("image_size", 256, "Height and width of the images; a multiple of 16.")
    flags.DEFINE_integer(
        "width", 16, "Channels of the Efficient U-Net's first level; a multiple of 4."
    )
    flags.DEFINE_integer("batch_size", 1, "Images per call.")
    flags.DEFINE_integer("rounds", 5, "Number of times each program is timed.")
    flags.DEFINE_list("blocks", ["2", "4", "8"], "Blocks per level in the table of compile times.")
    flags.DEFINE_enum(
        "clock",
        "wall",
        list(CLOCKS),
        "cpu counts only the time of this process, for a machine that other processes share.",
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Type of the activations.")
    flags.DEFINE_string("json", "", "File to write the figures to, as JSON.")


def main(argv: list[str]) -> None:
    """Measures both tables and prints them in Markdown."""
    del argv
    if not all(text.isdecimal() and int(text) > 0 for text in FLAGS.blocks):
        raise UserError(f"--blocks is {FLAGS.blocks}; it must be whole numbers above 0")
    clock = CLOCKS[FLAGS.clock]
    common = {"dtype": FLAGS.dtype, "text_dim": TEXT_DIM, "low_res": FLAGS.image_size // 4}
    unrolled = efficient(FLAGS.width, FLAGS.image_size, **common)
    configs = {
        "ordinary": ordinary(FLAGS.width, FLAGS.image_size, **common),
        "efficient, scanned": dataclasses.replace(unrolled, scan_blocks=True),
        "efficient, unrolled": unrolled,
    }
    networks = compare(configs, FLAGS.batch_size, FLAGS.rounds, clock)
    print(networks_table(networks, FLAGS.clock), flush=True)
    compiling = compile_times(unrolled, list(map(int, FLAGS.blocks)), clock)
    print(compile_table(compiling, FLAGS.clock))
    if FLAGS.json:
        settings = {
            key: FLAGS[key].value for key in ("image_size", "batch_size", "rounds", "clock")
        }
        settings |= {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
        figures = {"settings": settings, "networks": networks, "compiling": compiling}
        Path(FLAGS.json).write_text(json.dumps(figures, indent=2) + "\n")


def efficient(width: int, image_size: int, **common: Any) -> EfficientUNetConfig:
    """Returns sr256 scaled to a first level of `width` channels."""
    widths = tuple(width * mult for mult in (1, 2, 4, 8))
    return EfficientUNetConfig(
        image_size=image_size, widths=widths, cond_width=4 * width, num_heads=4, **common
    )


def ordinary(width: int, image_size: int, **common: Any) -> UNetConfig:
    """Returns the usual super-resolution U-Net: two blocks per level, attention at the last level.

    It is 1.5 times as wide as the Efficient U-Net, which gives about the same number of parameters.
    """
    width = 3 * width // 2
    return UNetConfig(
        image_size=image_size,
        embed_dim=width,
        channel_mult=(1, 2, 4, 8),
        num_res_blocks=2,
        attention_resolutions=(image_size // 8,),
        per_head_channels=width,
        **common,
    )


def network(config: EfficientUNetConfig | UNetConfig) -> Functional:
    cls = EfficientUNet if isinstance(config, EfficientUNetConfig) else UNet
    return functional(lambda rngs: cls(config, rngs=rngs))


def inputs(config: EfficientUNetConfig | UNetConfig, batch: int) -> tuple[Any, ...]:
    """Returns random z, log_snr and cond."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal((batch, *shape)), jnp.float32)

    cond = {
        "text": normal(TOKENS, TEXT_DIM),
        "text_mask": jnp.ones((batch, TOKENS), bool),
        "low_res": normal(config.low_res, config.low_res, 3),
        "aug_level": jnp.full((batch,), 0.5),
    }
    return normal(config.image_size, config.image_size, 3), jnp.zeros(batch), cond


def programs(config: EfficientUNetConfig | UNetConfig) -> dict[str, Callable[..., Any]]:
    """Returns the jitted functions of (params, z, log_snr, cond) to time."""
    apply = network(config).apply

    def loss(params, z, log_snr, cond):
        return jnp.square(apply(params, z, log_snr, cond) - z).mean()

    return {"forward": jax.jit(apply), "step": jax.jit(jax.value_and_grad(loss))}


def compare(configs: dict, batch: int, rounds: int, clock: Callable[[], float]) -> dict:
    """Measures parameters, seconds and bytes of each network; the programs take turns."""
    runs, results = {}, {name: {} for name in configs}
    for name, config in configs.items():
        shapes = jax.eval_shape(network(config).init, jax.random.key(0))
        params = jax.tree.map(lambda x: jnp.full(x.shape, 0.01, x.dtype), shapes)
        results[name]["params"] = sum(x.size for x in jax.tree.leaves(params))
        args = (params, *inputs(config, batch))
        for kind, program in programs(config).items():
            compiled = program.lower(*args).compile()
            results[name][f"{kind}_bytes"] = compiled.memory_analysis().temp_size_in_bytes
            jax.block_until_ready(compiled(*args))
            runs[name, kind] = (compiled, args)
    seconds = {key: [] for key in runs}
    for _ in range(rounds):
        for key, (compiled, args) in runs.items():
            start = clock()
            jax.block_until_ready(compiled(*args))
            seconds[key].append(clock() - start)
    for (name, kind), times in seconds.items():
        results[name][f"{kind}_seconds"] = times
    return results


def compile_times(
    config: EfficientUNetConfig, blocks: list[int], clock: Callable[[], float]
) -> list[dict]:
    """Measures the seconds to trace and compile a training step, per number of blocks."""
    rows = []
    for count in blocks:
        row = {"blocks": count}
        for key, scan in (("scanned", True), ("unrolled", False)):
            small = dataclasses.replace(
                config, num_res_blocks=(count,) * len(config.widths), scan_blocks=scan
            )
            shapes = jax.eval_shape(network(small).init, jax.random.key(0))
            start = clock()
            programs(small)["step"].lower(shapes, *inputs(small, 1)).compile()
            row[key] = clock() - start
        rows.append(row)
    return rows


def networks_table(networks: dict, clock: str) -> str:
    """Formats medians; ratios are medians over rounds."""
    rows = [("parameters", "params", 1)]
    for kind, title in (("forward", "forward pass"), ("step", "training step")):
        rows.append((f"{title}, {clock} s", f"{kind}_seconds", 1))
        rows.append((f"{title}, temporary MiB", f"{kind}_bytes", 2**20))
    lines = ["| | " + " | ".join(networks) + " |", "|---" * (1 + len(networks)) + "|"]
    for title, key, unit in rows:
        base, *others = (np.atleast_1d(values[key]) / unit for values in networks.values())
        cells = [_number(base)] + [f"{_number(x)} ({np.median(base / x):.2f})" for x in others]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _number(values: np.ndarray) -> str:
    middle = float(np.median(values))
    return f"{middle:,.0f}" if middle >= 1000 else f"{middle:.3g}"


def compile_table(compiling: list[dict], clock: str) -> str:
    """Formats the compile times, one row per number of blocks."""
    lines = [
        f"| blocks per level | scanned, {clock} s | unrolled, {clock} s | ratio |",
        "|---|---|---|---|",
    ]
    for row in compiling:
        scanned, unrolled = row["scanned"], row["unrolled"]
        ratio = unrolled / scanned
        lines.append(f"| {row['blocks']} | {scanned:.1f} | {unrolled:.1f} | {ratio:.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    define_flags()
    cli.run(main)
