"""Pre-trains the byte-level text encoder on text alone and writes it as a T5 folder.

    python -m data_pipelines.pretrain_text --out=DIR --steps=3000

The text, all of it there without a download:
- captions of the scenes grammar, its training split only, so no held-out combination is seen;
- the same followed by what they claim, spelled out, which is the span to be predicted: the encoder
  has to keep which color, shape, number and place belongs to what, whatever the wording;
- docstrings of the Python standard library and the topics of its `help()` (PSF license);
- names of Unicode symbols, in lower case: "smiling face with sunglasses" (Unicode license).

About 1 in 50 texts of each source is held out; the final loss on them is printed and recorded in
config.json beside the command. The decoder that training needs is not written.
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

from imagen_jax import cli
from imagen_jax.errors import UserError
from imagen_jax.text.hf_format import save_t5
from imagen_jax.text.pretraining import (
    SpanPredictor,
    corrupt_spans,
    span_loss,
    take_ending,
    unit_scale,
)
from imagen_jax.text.t5 import PRESETS
from imagen_jax.text.tokenizer import PAD_ID, ByteTokenizer

MODEL = "byte-tiny"
DECODER_LAYERS = 2
MAX_BYTES = 180
BUCKET = 64  # inputs are padded to a multiple of this
BATCH_TOKENS = 2048
WARMUP_STEPS = 200
HELDOUT_BATCHES = 8
MIXTURE = {"spelled-out captions": 0.5, "captions": 0.2, "docstrings": 0.2, "symbol names": 0.1}
MAX_ENDING = 96  # tokens of a spelled-out caption's claims, with sentinel and end
_ENCODE = ByteTokenizer().encode
SYMBOLS = (range(0x2190, 0x2C00), range(0x1F000, 0x1FB00))


class Text(NamedTuple):
    """A text, and the ending to be predicted from it; "" where random spans are."""

    text: str
    ending: str = ""


def caption_texts(number: int, rng: np.random.Generator) -> tuple[list[Text], list[Text]]:
    """Distinct captions of `number` training scenes: alone, and with their claims as ending."""
    from data_pipelines.scenes.claims import spelled_out
    from data_pipelines.scenes.grammar import sample_scene

    scenes = [sample_scene(rng, "train") for _ in range(number)]
    claims = {scene.caption: spelled_out(scene.claims) for scene in scenes}
    fitting = [Text(c, e) for c, e in claims.items() if len(e.encode()) <= MAX_ENDING - 2]
    return [Text(caption) for caption in claims], fitting


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

    def batches(
        self, parts: dict[str, list[Text]], rng: np.random.Generator
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Endless (inputs, targets): sources by MIXTURE, each batch of texts about equally long."""
        names = [name for name in MIXTURE if name in parts]
        shares = np.array([MIXTURE[name] for name in names])
        waiting: dict[tuple[int, int], list[tuple[np.ndarray, np.ndarray]]] = {}
        while True:
            texts = parts[names[rng.choice(len(names), p=shares / shares.sum())]]
            text = texts[rng.integers(len(texts))]
            pair = _corrupted(text, rng)
            length = -(-len(pair[0]) // BUCKET) * BUCKET
            shape = (length, MAX_ENDING if text.ending else length // 4)
            rows = waiting.setdefault(shape, [])
            rows.append(pair)
            if len(rows) == BATCH_TOKENS // length:
                yield tuple(map(_padded, zip(*waiting.pop(shape), strict=True), shape))


def _corrupted(text: Text, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    vocab_size = PRESETS[MODEL].vocab_size
    ids, ending = (np.array(_ENCODE(part)[:-1], np.int32) for part in text)
    if text.ending:
        return take_ending(np.concatenate([ids, ending]), len(ids), vocab_size)
    return corrupt_spans(ids, vocab_size, rng)


def _padded(rows: Sequence[np.ndarray], length: int) -> np.ndarray:
    out = np.full((len(rows), length), PAD_ID, np.int32)
    for row, ids in zip(out, rows, strict=True):
        row[: len(ids)] = ids
    return out


def train(
    corpus: Corpus, steps: int, learning_rate: float, seed: int
) -> tuple[SpanPredictor, dict]:
    """Trains a model; returns it with its held-out loss, in nats a byte, for each source."""
    model = SpanPredictor(PRESETS[MODEL], DECODER_LAYERS, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(WARMUP_STEPS, steps // 2), steps
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01)
    )

    def loss_fn(params, inputs, targets):
        return span_loss(nnx.merge(graphdef, params), inputs, targets)

    @jax.jit
    def step(params, opt_state, inputs, targets):
        loss, grads = jax.value_and_grad(loss_fn)(params, inputs, targets)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    opt_state = optimizer.init(params)
    batches = corpus.batches(corpus.train, np.random.default_rng(seed + 1))
    progress = _Progress(steps)
    for i in range(steps):
        params, opt_state, loss = step(params, opt_state, *next(batches))
        progress.update(i + 1, loss)
    losses = {}
    loss_fn = jax.jit(loss_fn)
    for name, texts in corpus.heldout.items():
        batches = corpus.batches({name: texts}, np.random.default_rng(seed + 2))
        measured = [loss_fn(params, *next(batches)) for _ in range(HELDOUT_BATCHES)]
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
    flags.DEFINE_integer("steps", 3000, "Optimizer steps.", lower_bound=1)
    flags.DEFINE_integer(
        "captions",
        200_000,
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
    captions, spelled_out = caption_texts(flags.FLAGS.captions, rng)
    sources = {
        "captions": captions,
        "spelled-out captions": spelled_out,
        "docstrings": docstring_texts(),
        "symbol names": symbol_texts(),
    }
    sizes = ", ".join(f"{len(texts)} {name}" for name, texts in sources.items())
    print(f"text: {sizes}", flush=True)
    corpus = Corpus(sources, flags.FLAGS.seed)
    model, losses = train(corpus, flags.FLAGS.steps, flags.FLAGS.learning_rate, flags.FLAGS.seed)
    print(f"held-out loss, nats a byte: {losses}")
    record = {
        "command": shlex.join(["python", "-m", "data_pipelines.pretrain_text", *sys.argv[1:]]),
        "steps": flags.FLAGS.steps,
        "text": f"{sizes} (Python {platform.python_version()})",
        "mixture": MIXTURE,
        "heldout_loss_nats": losses,
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
