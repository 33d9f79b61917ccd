"""Writes one HTML page with a batch exactly as the model gets it, and the reader's speed by part.

    python -m data_pipelines.inspect --config=configs/folder.py --out=inspect.html

--position=N shows the batch that a run reads after N examples. The page needs no other files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from typing import TYPE_CHECKING

from absl import flags

from imagen_jax.common import cli, typed_config
from imagen_jax.common.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from data_pipelines.reading.examples import Example
    from data_pipelines.reading.reader import Reader

FLAGS = flags.FLAGS
_STYLE = "<style>td img { width: 128px; image-rendering: pixelated } td { max-width: 30em }</style>"


def define_flags() -> None:
    cli.define_config_flags(None, "Config file, as for imagen_jax.train.")
    flags.DEFINE_integer("position", 0, "Examples that the run has already read.", lower_bound=0)
    flags.DEFINE_integer("num", 32, "Examples to show.", lower_bound=1)
    flags.DEFINE_float("seconds", 5, "Time to measure the speed for; 0 does not.", lower_bound=0)
    flags.DEFINE_string("out", "inspect.html", "Page to write.")


def main(argv: list[str]) -> None:
    """Reads a batch, measures the reader and writes the page."""
    del argv
    if not FLAGS.config:
        raise UserError("--config=FILE is needed, for example --config=configs/folder.py")
    values = typed_config.load(FLAGS.config, FLAGS.set)
    from etils import epath

    from imagen_jax.common import html
    from imagen_jax.common.files import write_text
    from imagen_jax.config import parse

    config = parse(values)
    with cli.quiet_imports():
        from data_pipelines.reading.reader import Reader

    reader = Reader(config)
    examples = reader.training_examples(FLAGS.position, FLAGS.num)
    speed = measure(reader, FLAGS.position, FLAGS.seconds) if FLAGS.seconds else []
    counts, entries = reader.take_bad_records()
    parts = [_STYLE, html.element("p", f"position {FLAGS.position:,}, seed {config.seed}")]
    parts += [_examples(reader, examples, FLAGS.position)]
    if speed:
        parts += [html.element("h2", "Speed"), html.table(("part", "figure"), speed)]
    if counts:
        rows = [(e["id"], e["task"], e["reason"], e["detail"]) for e in entries[:100]]
        parts += [html.element("h2", f"Bad records: {sum(counts.values())}")]
        parts += [html.table(("id", "task", "reason", "details"), rows)]
    try:
        write_text(epath.Path(FLAGS.out), html.page(f"Data of {FLAGS.config}", *parts))
    except OSError as e:
        raise UserError(f"--out={FLAGS.out} cannot be written: {e.strerror}") from e
    for name, figure in speed:
        cli.log.info("%-28s %s", name, figure)
    cli.log.info("wrote %s", FLAGS.out)


def _examples(reader: Reader, examples: list[Example], position: int) -> str:
    """Returns a table of the examples as the network gets them."""
    from imagen_jax.common import html
    from imagen_jax.diffusion.conditioning import shrink_pixels

    batch, size = reader.pad(examples), reader.config.unet.low_res
    low_res = shrink_pixels(batch["image"], size) if size else None
    names = ["position", "image", *(["low-resolution input"] if size else []), "caption"]
    names += ["tokens", "mask", "id", "source"]
    lines = [f"<tr>{''.join(html.element('th', name) for name in names)}</tr>"]
    for i, example in enumerate(examples):
        pictures = [batch["image"][i], *([low_res[i]] if size else [])]
        tokens = "+".join(str(len(text)) for text in example.texts)
        cells = [html.element("td", f"{position + i:,}")]
        cells += [f"<td>{html.picture(p, example.record.id)}</td>" for p in pictures]
        texts = (example.caption, tokens, _runs(batch["text_mask"][i]), example.record.id)
        texts += (f"{example.task}, record {example.index:,}",)
        cells += [html.element("td", text) for text in texts]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _runs(mask: np.ndarray) -> str:
    """Writes a mask as runs of tokens that are attended to (1) and padding (0): "1x7 0x121"."""
    import numpy as np

    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(mask)]
    return " ".join(f"{int(mask[a])}x{b - a}" for a, b in itertools.pairwise(edges))


def measure(reader: Reader, position: int, seconds: float) -> list[tuple[str, str]]:
    """Reads batches for a while: the rate, and the time of all threads by part of the work."""
    with contextlib.closing(reader.train_batches(position)) as batches:
        batch = next(batches)
        size = len(batch["image"])
        before, start, num = reader.clock.seconds.copy(), time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            next(batches)
            num += size
        taken, after = time.perf_counter() - start, reader.clock.seconds.copy()
    cores = len(os.sched_getaffinity(0))
    rows = [("examples/s", f"{num / taken:,.1f} on {cores} core(s)")]
    rows += [("examples/s per core", f"{num / taken / cores:,.1f}")]
    after.subtract(before)
    total = sum(after.values())
    for part, spent in after.most_common():
        each = f"{spent / num * 1e3:.3f} ms per example ({spent / total:.0%})"
        rows.append((part, each))
    return rows


if __name__ == "__main__":
    define_flags()
    cli.run(main)
