"""Pre-trains the byte-level text encoder on text alone and writes it as a T5 folder.

    python -m imagen_jax.pretrain_text --out=DIR

It downloads nothing. The texts come from:
- captions of the scenes grammar, from the training split only, so that no held-out combination
  appears. The encoder learns to predict the colors, shapes, numbers and positions that a caption
  states, from each of its bytes;
- the same captions without these facts and with masked words, which the encoder predicts;
- docstrings of the Python standard library and the topics of its `help()` (PSF license), masked;
- names of Unicode symbols in lower case, such as "smiling face with sunglasses" (Unicode license),
  masked.

About 1 in 50 texts of each source is held out. The command prints the final loss on them and
records it with the command line in config.json. It does not write the prediction heads.
"""

from __future__ import annotations

import ast
import platform
import re
import shlex
import sys
import sysconfig
import time
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from data_pipelines.scenes.facts import FACTS, mentions, stated
from data_pipelines.scenes.grammar import sample_scene
from imagen_jax.common import cli
from imagen_jax.common.files import check_folder

MODEL = "byte-tiny"
MAX_BYTES = 180
MIXTURE = {"captions with facts": 0.7, "captions": 0.1, "docstrings": 0.15, "symbol names": 0.05}
SYMBOLS = (range(0x2190, 0x2C00), range(0x1F000, 0x1FB00))
_FACT_ID = {fact: i for i, fact in enumerate(FACTS)}


def caption_texts(
    number: int, rng: np.random.Generator
) -> list[tuple[str, list[int], list[tuple[int, int, list[int]]]]]:
    """Returns the distinct captions of `number` training scenes: caption, stated, mentions.

    The last two are the fields of pretraining.Text; ids are indices of FACTS.
    """
    scenes = {scene.caption: scene for scene in (sample_scene(rng, "train") for _ in range(number))}

    def ids(facts: set[str]) -> list[int]:
        return [_FACT_ID[fact] for fact in facts]

    return [
        (c, ids(stated(s.claims)), [(a, b, ids(facts)) for a, b, facts in mentions(s)])
        for c, s in scenes.items()
    ]


def docstring_texts() -> list[str]:
    """Returns distinct sentences from the standard library's docstrings and help topics."""
    from pydoc_data.topics import topics

    documents = list(topics.values())
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        if path.parent.name in ("site-packages", "test"):
            continue
        tree = ast.parse(path.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        documents += [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, kinds)]
    return list(dict.fromkeys(piece for text in documents for piece in _pieces(text)))


def _pieces(text: str) -> Iterator[str]:
    """Yields sentences, split between words at MAX_BYTES. Leaves out code and tables."""
    for paragraph in re.split(r"\n\s*\n", text):
        if re.search(r">>>|\|\s|\+-|={3}|-{3}", paragraph):
            continue
        for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
            piece = ""
            for word in sentence.split():
                if piece and len(f"{piece} {word}".encode()) > MAX_BYTES:
                    yield piece
                    piece = ""
                piece = f"{piece} {word}".strip()
            if 8 <= len(piece.encode()) <= MAX_BYTES:
                yield piece


def symbol_texts() -> list[str]:
    """Returns the names of Unicode's arrows, shapes, pictographs and emoji, in lower case."""
    names = (unicodedata.name(chr(c), "").lower() for block in SYMBOLS for c in block)
    return [name for name in names if name]


class _Progress:
    """Progress lines every ten seconds: step, mean loss since the last line, speed, time left."""

    def __init__(self, steps: int):
        self.steps = steps
        self.start = self.printed = time.monotonic()
        self.losses: list[np.ndarray] = []

    def update(self, done: int, loss: np.ndarray) -> None:
        self.losses.append(loss)
        now = time.monotonic()
        if now - self.printed < 10 and done < self.steps:
            return
        speed = done / (now - self.start)
        print(
            f"step {done}/{self.steps}  loss {np.mean(self.losses):.3f}  {speed:.2f} steps/s  "
            f"{(self.steps - done) / speed / 60:.1f} min left",
            flush=True,
        )
        self.printed = time.monotonic()
        self.losses = []


def define_flags() -> None:
    """Defines the flags; a function, so that importing this module defines none."""
    flags.DEFINE_string(
        "out", None, "Directory for config.json and model.safetensors; created if missing."
    )
    flags.DEFINE_integer("steps", 1500, "Number of optimizer steps.", lower_bound=1)
    flags.DEFINE_integer(
        "captions", 60_000, "Number of scene captions to sample; duplicates count.", lower_bound=1
    )
    flags.DEFINE_float("learning_rate", 2e-3, "Peak learning rate of AdamW.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Seed of the texts, their order and the initial weights.")
    flags.mark_flag_as_required("out")


def main(argv: Sequence[str]) -> None:
    """Collects the texts, trains the encoder and writes it to --out."""
    del argv
    out = Path(flags.FLAGS.out)
    check_folder(out, "out")
    # These import JAX, which --help does not need.
    import ml_dtypes

    from imagen_jax.text.hf_format import save_t5
    from imagen_jax.text.pretraining import Corpus, Text, train
    from imagen_jax.text.t5 import PRESETS

    steps, seed = flags.FLAGS.steps, flags.FLAGS.seed
    captions = caption_texts(flags.FLAGS.captions, np.random.default_rng(seed))
    sources = {
        "captions with facts": [Text(*caption) for caption in captions],
        "captions": [Text(caption) for caption, *_ in captions],
        "docstrings": [Text(text) for text in docstring_texts()],
        "symbol names": [Text(text) for text in symbol_texts()],
    }
    sizes = ", ".join(f"{len(texts)} {name}" for name, texts in sources.items())
    print(f"text: {sizes}", flush=True)
    config = PRESETS[MODEL]
    corpus = Corpus(sources, MIXTURE, len(FACTS), config.vocab_size - 1, seed)
    progress = _Progress(steps).update
    encoder, losses = train(corpus, config, steps, flags.FLAGS.learning_rate, seed, progress)
    print(f"held-out loss: {losses}")
    record = {
        "command": shlex.join(["python", "-m", "imagen_jax.pretrain_text", *sys.argv[1:]]),
        "steps": steps,
        "text": f"{sizes} (Python {platform.python_version()})",
        "mixture": MIXTURE,
        "heldout_loss": losses,
    }
    extra = {"tokenizer_class": "ByT5Tokenizer", "pretraining": record}
    save_t5(encoder, out, dtype=ml_dtypes.bfloat16, extra=extra)
    print(f"wrote {out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
