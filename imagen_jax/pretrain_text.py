"""Pre-trains the byte-level text encoder on text alone and writes it as a T5 folder.

    python -m imagen_jax.pretrain_text --out=DIR

The text, all of it there without a download:
- captions of the scenes grammar, its training split only, so no held-out combination is seen, with
  what they say of colors, shapes, numbers and places, to be told from each of their bytes;
- the same captions without that, some words masked, to be named;
- docstrings of the Python standard library and the topics of its `help()` (PSF license), and
- names of Unicode symbols, in lower case: "smiling face with sunglasses" (Unicode license), both
  with words masked.

About 1 in 50 texts of each source is held out; the final loss on them is printed and recorded in
config.json beside the command. The heads that training needs are not written.
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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from absl import flags
from flax import nnx

from data_pipelines.scenes.facts import FACTS, mentions, stated
from data_pipelines.scenes.grammar import sample_scene
from imagen_jax.common import cli
from imagen_jax.common.errors import UserError
from imagen_jax.text.hf_format import save_t5
from imagen_jax.text.pretraining import (
    UNKNOWN,
    Batch,
    TextReader,
    choose_masked,
    reading_loss,
    unit_scale,
    word_buckets,
)
from imagen_jax.text.t5 import PRESETS
from imagen_jax.text.tokenizer import PAD_ID, ByteTokenizer

MODEL = "byte-tiny"
MAX_BYTES = 180
BUCKET = 64  # texts are padded to a multiple of this
BATCH_TOKENS = 2048
WARMUP_STEPS = 200
HELDOUT_BATCHES = 8
MIXTURE = {"captions with facts": 0.7, "captions": 0.1, "docstrings": 0.15, "symbol names": 0.05}
NUM_FACTS = 2 * len(FACTS)  # of the caption, and of the thing that a word points at
MASK_ID = PRESETS[MODEL].vocab_size - 1
_ENCODE = ByteTokenizer().encode
_FACT_ID = {fact: i for i, fact in enumerate(FACTS)}
SYMBOLS = (range(0x2190, 0x2C00), range(0x1F000, 0x1FB00))


class Text(NamedTuple):
    """A text, and what is known of it.

    Attributes:
        stated: ids of FACTS that it states; None where they are not known.
        mentions: (start, end, ids) of words that point at one thing, and what is said of that.
    """

    text: str
    stated: list[int] | None = None
    mentions: Sequence[tuple[int, int, list[int]]] = ()


def caption_texts(number: int, rng: np.random.Generator) -> tuple[list[Text], list[Text]]:
    """Distinct captions of `number` training scenes: with what is known of them, and alone."""
    scenes = {scene.caption: scene for scene in (sample_scene(rng, "train") for _ in range(number))}

    def ids(facts: set[str]) -> list[int]:
        return [_FACT_ID[fact] for fact in facts]

    known = [
        Text(c, ids(stated(s.claims)), [(a, b, ids(facts)) for a, b, facts in mentions(s)])
        for c, s in scenes.items()
    ]
    return known, [Text(caption) for caption in scenes]


def docstring_texts() -> list[Text]:
    """Distinct pieces of the standard library's docstrings and help topics, MAX_BYTES at most."""
    from pydoc_data.topics import topics

    documents = list(topics.values())
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted([*root.glob("*.py"), *root.glob("[a-z]*/*.py")]):
        if path.parent.name in ("site-packages", "test"):
            continue
        tree = ast.parse(path.read_bytes())
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        documents += [ast.get_docstring(n) or "" for n in ast.walk(tree) if isinstance(n, kinds)]
    pieces = (p for text in documents for p in _pieces(text))
    return [Text(piece) for piece in dict.fromkeys(pieces)]


def _pieces(text: str) -> Iterator[str]:
    """Sentences of a text, the long ones cut between words; code and tables are left out."""
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


def symbol_texts() -> list[Text]:
    """The names of Unicode's arrows, shapes, pictographs and emoji, in lower case."""
    names = (unicodedata.name(chr(c), "").lower() for block in SYMBOLS for c in block)
    return [Text(name) for name in names if name]


class Corpus:
    """Every source's texts, split into training and held-out; batches are of one length each."""

    def __init__(self, sources: dict[str, list[Text]], seed: int):
        rng = np.random.default_rng(seed)
        self.train: dict[str, list[Text]] = {}
        self.heldout: dict[str, list[Text]] = {}
        for name, texts in sources.items():
            shuffled = [texts[i] for i in rng.permutation(len(texts))]
            cut = max(1, len(texts) // 50)
            self.heldout[name], self.train[name] = shuffled[:cut], shuffled[cut:]

    def batches(self, parts: dict[str, list[Text]], rng: np.random.Generator) -> Iterator[Batch]:
        """Endless: sources by MIXTURE, each batch of texts of one source, about equally long."""
        names = [name for name in MIXTURE if name in parts]
        shares = np.array([MIXTURE[name] for name in names])
        waiting: dict[tuple[str, int], list[Batch]] = {}
        while True:
            name = names[rng.choice(len(names), p=shares / shares.sum())]
            text = parts[name][rng.integers(len(parts[name]))]
            row = _row(text, rng)
            rows = waiting.setdefault((name, len(row.ids)), [])
            rows.append(row)
            if len(rows) == BATCH_TOKENS // len(row.ids):
                del waiting[name, len(row.ids)]
                yield Batch(*map(np.stack, zip(*rows, strict=True)))


def _row(text: Text, rng: np.random.Generator) -> Batch:
    """One text, padded. Words are masked where nothing else is to be told of it."""
    ids = np.array(_ENCODE(text.text), np.int32)
    words = np.append(word_buckets(text.text), UNKNOWN)
    facts = np.full((len(ids), NUM_FACTS), UNKNOWN, np.int8)
    masked = np.zeros(len(ids), bool)
    if text.stated is None:
        masked = choose_masked(words, rng)
        ids = np.where(masked, MASK_ID, ids)
    else:
        facts[:, : len(FACTS)] = 0
        facts[:, text.stated] = 1
        for start, end, pointed_at in text.mentions:
            facts[start:end, len(FACTS) :] = 0
            facts[start:end, np.add(pointed_at, len(FACTS))] = 1
    padding = (0, -len(ids) % BUCKET)
    return Batch(
        np.pad(ids, padding, constant_values=PAD_ID),
        np.pad(words, padding, constant_values=UNKNOWN),
        np.pad(masked, padding),
        np.pad(facts, (padding, (0, 0)), constant_values=UNKNOWN),
    )


def train(corpus: Corpus, steps: int, learning_rate: float, seed: int) -> tuple[TextReader, dict]:
    """Trains a model; returns it with its held-out loss for each source."""
    model = TextReader(PRESETS[MODEL], NUM_FACTS, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(WARMUP_STEPS, steps // 2), steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )

    def loss_fn(params, batch):
        return reading_loss(nnx.merge(graphdef, params), batch)

    @jax.jit
    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    batches = corpus.batches(corpus.train, np.random.default_rng(seed + 1))
    progress = _Progress(steps)
    for i in range(steps):
        params, opt_state, loss = step(params, opt_state, next(batches))
        progress.update(i + 1, loss)
    losses = {}
    loss_fn = jax.jit(loss_fn)
    for name, texts in corpus.heldout.items():
        batches = corpus.batches({name: texts}, np.random.default_rng(seed + 2))
        measured = [loss_fn(params, next(batches)) for _ in range(HELDOUT_BATCHES)]
        losses[name] = round(float(jnp.mean(jnp.stack(measured))), 4)
    model = nnx.merge(graphdef, params)
    samples = [text.text for texts in corpus.heldout.values() for text in texts[:200]]
    unit_scale(model.encoder, [np.array(_ENCODE(text), np.int32) for text in samples])
    return model, losses


class _Progress:
    """Prints step, mean loss since the last line, speed and the time left, every ten seconds."""

    def __init__(self, steps: int):
        self.steps = steps
        self.start = self.printed = time.monotonic()
        self.losses: list[jax.Array] = []

    def update(self, done: int, loss: jax.Array) -> None:
        self.losses.append(loss)
        now = time.monotonic()
        if now - self.printed < 10 and done < self.steps:
            return
        speed = done / (now - self.start)
        mean = float(jnp.mean(jnp.stack(self.losses)))
        print(
            f"step {done}/{self.steps}  loss {mean:.3f}  {speed:.2f} steps/s  "
            f"{(self.steps - done) / speed / 60:.1f} min left",
            flush=True,
        )
        self.printed = time.monotonic()
        self.losses = []


def define_flags() -> None:
    flags.DEFINE_string("out", None, "Folder for config.json and model.safetensors.")
    flags.DEFINE_integer("steps", 1500, "Optimizer steps.", lower_bound=1)
    flags.DEFINE_integer(
        "captions",
        60_000,
        "Scene captions to sample, before equal ones are merged.",
        lower_bound=1,
    )
    flags.DEFINE_float("learning_rate", 2e-3, "Peak of AdamW's learning rate.", lower_bound=0.0)
    flags.DEFINE_integer("seed", 0, "Seed of the text, its order and the initial weights.")
    flags.mark_flag_as_required("out")


def main(argv: Sequence[str]) -> None:
    del argv
    out = Path(flags.FLAGS.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file; it must be a folder, or not be there yet")
    rng = np.random.default_rng(flags.FLAGS.seed)
    with_facts, alone = caption_texts(flags.FLAGS.captions, rng)
    sources = {
        "captions with facts": with_facts,
        "captions": alone,
        "docstrings": docstring_texts(),
        "symbol names": symbol_texts(),
    }
    sizes = ", ".join(f"{len(texts)} {name}" for name, texts in sources.items())
    print(f"text: {sizes}", flush=True)
    corpus = Corpus(sources, flags.FLAGS.seed)
    model, losses = train(corpus, flags.FLAGS.steps, flags.FLAGS.learning_rate, flags.FLAGS.seed)
    print(f"held-out loss: {losses}")
    record = {
        "command": shlex.join(["python", "-m", "imagen_jax.pretrain_text", *sys.argv[1:]]),
        "steps": flags.FLAGS.steps,
        "text": f"{sizes} (Python {platform.python_version()})",
        "mixture": MIXTURE,
        "heldout_loss": losses,
    }
    save_t5(
        model.encoder,
        out,
        dtype=ml_dtypes.bfloat16,
        extra={"tokenizer_class": "ByT5Tokenizer", "pretraining": record},
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
