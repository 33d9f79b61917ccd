"""Measures how easily a probe reads a text encoder, compared with random weights.

    python -m benchmarks.text_probe --encoder=byte-tiny

The probe is the simplest text path of a diffusion model: one attention head with two learned
queries, and a linear map from each result, one to the color and one to the shape. It trains on
captions of scenes with a single object. The benchmark prints its accuracy on other captions after
few and after many batches. Captions vary in wording, size, texture, background and misspellings;
all pairs of color and shape are from the train split.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from flax import nnx

from data_pipelines.scenes.grammar import sample_scene
from data_pipelines.scenes.vocabulary import COLORS, SHAPES
from imagen_jax.common import cli
from imagen_jax.text import load_encoder
from imagen_jax.text.loading import RANDOM

FLAGS = flags.FLAGS
BATCH = 64
LEARNING_RATE = 2e-3
MAX_TOKENS = 192


def define_flags() -> None:
    flags.DEFINE_string(
        "encoder", "byte-tiny", "Text encoder: byte-tiny or a folder (docs/text.md)."
    )
    flags.DEFINE_integer("train", 3200, "Number of training captions.", lower_bound=BATCH)
    flags.DEFINE_integer("test", 800, "Number of test captions.", lower_bound=1)
    flags.DEFINE_list("steps", ["100", "600"], "Numbers of training batches after which to test.")
    flags.DEFINE_integer("seed", 0, "Seed of the captions, the batches and the probe's weights.")


def main(argv: list[str]) -> None:
    """Probes both encoders and prints a Markdown table."""
    del argv
    steps = [int(s) for s in FLAGS.steps]
    captions, labels = single_objects(FLAGS.train + FLAGS.test, np.random.default_rng(FLAGS.seed))
    encoders = {
        name: load_encoder(name, MAX_TOKENS) for name in (FLAGS.encoder + RANDOM, FLAGS.encoder)
    }
    print(f"| encoder | {' | '.join(f'{s} batches: color / shape' for s in steps)} |")
    print("|---" * (len(steps) + 1) + "|")
    for name, encoder in encoders.items():
        features = _padded(encoder.encode(captions))
        scores = probe(features, labels, steps, FLAGS.test, FLAGS.seed)
        cells = (f"{color:.0%} / {shape:.0%}" for color, shape in scores)
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def single_objects(number: int, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Samples distinct captions of one object, with its color and shape: int [number, 2]."""
    found = {}
    while len(found) < number:
        scene = sample_scene(rng, "train")
        if len(scene.objects) == 1 and scene.word is None:
            [thing] = scene.objects
            found[scene.caption] = (list(COLORS).index(thing.color), SHAPES.index(thing.shape))
    return list(found), np.array(list(found.values()))


def _padded(embeddings: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    text = np.zeros((len(embeddings), max(map(len, embeddings)), embeddings[0].shape[1]), "f4")
    mask = np.zeros(text.shape[:2], bool)
    for row, embedding in enumerate(embeddings):
        text[row, : len(embedding)], mask[row, : len(embedding)] = embedding, True
    return text, mask


class Probe(nnx.Module):
    """One attention head with a learned query and a linear map each for color and shape."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.queries = nnx.Param(rngs.params.normal((2, dim)) * dim**-0.5)
        self.key = nnx.Linear(dim, dim, rngs=rngs)
        self.value = nnx.Linear(dim, dim, rngs=rngs)
        self.color = nnx.Linear(dim, len(COLORS), rngs=rngs)
        self.shape = nnx.Linear(dim, len(SHAPES), rngs=rngs)

    def __call__(self, text_btd: jax.Array, mask_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns logits of the color [B, 11] and of the shape [B, 15]."""
        k_btd, v_btd = self.key(text_btd), self.value(text_btd)
        logits_bqt = jnp.einsum("qd,btd->bqt", self.queries[...], k_btd)
        weights_bqt = jax.nn.softmax(jnp.where(mask_bt[:, None, :], logits_bqt, -1e30), axis=-1)
        found_bqd = jnp.einsum("bqt,btd->bqd", weights_bqt, v_btd)
        return self.color(found_bqd[:, 0]), self.shape(found_bqd[:, 1])


def probe(
    features: tuple[np.ndarray, np.ndarray],
    labels: np.ndarray,
    steps: list[int],
    num_test: int,
    seed: int = 0,
) -> list[tuple[float, float]]:
    """Trains a probe and returns its (color, shape) accuracy after each number in `steps`.

    Args:
      features: float32 [N, T, D] and bool [N, T], True at tokens.
      labels: color and shape, int [N, 2].
      num_test: number of examples at the end that are held out for testing.
    """
    text, mask = features
    graphdef, params = nnx.split(Probe(text.shape[-1], rngs=nnx.Rngs(seed)))
    optimizer = optax.adam(LEARNING_RATE)
    opt_state = optimizer.init(params)

    def loss_fn(params, text, mask, labels):
        logits = nnx.merge(graphdef, params)(text, mask)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(part, labels[:, i])
            for i, part in enumerate(logits)
        ]
        return sum(loss.mean() for loss in losses)

    @jax.jit
    def step(params, opt_state, *batch):
        grads = jax.grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    rng, scores = np.random.default_rng(seed), []
    for i in range(max(steps)):
        rows = rng.choice(len(labels) - num_test, BATCH, replace=False)
        params, opt_state = step(params, opt_state, text[rows], mask[rows], labels[rows])
        if i + 1 in steps:
            test = slice(-num_test, None)
            logits = nnx.merge(graphdef, params)(text[test], mask[test])
            right = [np.argmax(part, -1) == labels[test, j] for j, part in enumerate(logits)]
            scores.append(tuple(float(r.mean()) for r in right))
    return scores


if __name__ == "__main__":
    define_flags()
    cli.run(main)
