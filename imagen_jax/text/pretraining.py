"""Pre-training objective for a byte-level encoder whose output linear heads can read.

A diffusion model reads text through projections and attention, so the objective trains features
that such simple readers can use. At every output byte, linear heads predict the word that contains
the byte, masked or not, and the facts that the text states. An objective with a decoder, such as
T5's span corruption (arXiv:1910.10683), allows features that only a decoder can untangle. Masking
is BERT's, in whole words (arXiv:1810.04805). The heads are discarded after pre-training.

`Corpus` makes batches of texts; `train` runs the optimizer.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from imagen_jax.text.t5 import T5Config, T5Encoder
from imagen_jax.text.tokenizer import PAD_ID, ByteTokenizer

MASK_RATE = 0.15
WORD_BUCKETS = 2048
UNKNOWN = -1  # label of a position with nothing to predict
MASKED_WEIGHT = 0.2  # with 1 here and 0.2 for unmasked words, those were hardly learned

BUCKET = 64  # texts are padded to a multiple of this
BATCH_TOKENS = 2048
WARMUP_STEPS = 200
HELDOUT_BATCHES = 8


class Text(NamedTuple):
    """A text and the facts known about it.

    Attributes:
      stated: ids of the facts that it states; None if they are unknown.
      mentions: (start, end, ids) of the bytes that refer to one thing, and the facts stated about
        that thing.
    """

    text: str
    stated: Sequence[int] | None = None
    mentions: Sequence[tuple[int, int, Sequence[int]]] = ()


class Batch(NamedTuple):
    """Texts padded to one length, with their labels.

    Attributes:
      ids: int [B, T], with masked words replaced.
      words: int [B, T], the bucket of the word that contains a byte; UNKNOWN between words.
      masked: bool [B, T], True inside masked words.
      facts: int [B, T, F], 1 if a fact holds, 0 if it does not, or UNKNOWN.
    """

    ids: np.ndarray
    words: np.ndarray
    masked: np.ndarray
    facts: np.ndarray


def word_buckets(text: str) -> np.ndarray:
    """Returns the bucket of the word that contains each byte of `text`: int [num_bytes].

    Words are hashed case-insensitively, so every word of every language has a bucket.
    """
    encoded = text.encode()
    buckets = np.full(len(encoded), UNKNOWN, np.int32)
    for word in re.finditer(rb"[\w\x80-\xff]+", encoded):
        buckets[slice(*word.span())] = zlib.crc32(word[0].lower()) % WORD_BUCKETS
    return buckets


def choose_masked(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Picks whole words at MASK_RATE, at least one if there are any: bool [n]."""
    starts = words != np.concatenate([[UNKNOWN], words[:-1]])
    number = np.cumsum(starts)  # of the run of equal labels around a byte
    runs = np.unique(number[words != UNKNOWN])
    if not len(runs):
        return np.zeros(len(words), bool)
    chosen = runs[rng.random(len(runs)) < MASK_RATE]
    if not len(chosen):
        chosen = rng.choice(runs, 1)
    return np.isin(number, chosen) & (words != UNKNOWN)


class Corpus:
    """Texts of several sources, each split into training and held-out (1 in 50) texts.

    Args:
      sources: texts by source.
      mixture: share of each source in the training batches.
      num_facts: facts that a text can state. Labels have twice as many: those of the text, then
        those of the thing that a word refers to.
      mask_id: token id that replaces the bytes of masked words.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Text]],
        mixture: Mapping[str, float],
        num_facts: int,
        mask_id: int,
        seed: int,
    ):
        self.mixture, self.num_facts, self.mask_id = mixture, num_facts, mask_id
        rng = np.random.default_rng(seed)
        self.train: dict[str, list[Text]] = {}
        self.heldout: dict[str, list[Text]] = {}
        for name, texts in sources.items():
            shuffled = [texts[i] for i in rng.permutation(len(texts))]
            cut = max(1, len(texts) // 50)
            self.heldout[name], self.train[name] = shuffled[:cut], shuffled[cut:]

    def batches(self, parts: dict[str, list[Text]], rng: np.random.Generator) -> Iterator[Batch]:
        """Yields batches endlessly, each from one source and of texts of similar length."""
        names = [name for name in self.mixture if name in parts]
        shares = np.array([self.mixture[name] for name in names])
        waiting: dict[tuple[str, int], list[Batch]] = {}
        while True:
            name = names[rng.choice(len(names), p=shares / shares.sum())]
            text = parts[name][rng.integers(len(parts[name]))]
            row = labeled(text, self.num_facts, self.mask_id, rng)
            rows = waiting.setdefault((name, len(row.ids)), [])
            rows.append(row)
            if len(rows) == BATCH_TOKENS // len(row.ids):
                del waiting[name, len(row.ids)]
                yield Batch(*map(np.stack, zip(*rows, strict=True)))


def labeled(text: Text, num_facts: int, mask_id: int, rng: np.random.Generator) -> Batch:
    """Returns one padded text with its labels, without the batch axis.

    Masks words only if the facts are unknown.
    """
    ids = np.array(ByteTokenizer().encode(text.text), np.int32)
    words = np.append(word_buckets(text.text), UNKNOWN)
    facts = np.full((len(ids), 2 * num_facts), UNKNOWN, np.int8)
    masked = np.zeros(len(ids), bool)
    if text.stated is None:
        masked = choose_masked(words, rng)
        ids = np.where(masked, mask_id, ids)
    else:
        facts[:, :num_facts] = 0
        facts[:, text.stated] = 1
        for start, end, stated in text.mentions:
            facts[start:end, num_facts:] = 0
            facts[start:end, np.add(stated, num_facts)] = 1
    padding = (0, -len(ids) % BUCKET)
    return Batch(
        np.pad(ids, padding, constant_values=PAD_ID),
        np.pad(words, padding, constant_values=UNKNOWN),
        np.pad(masked, padding),
        np.pad(facts, (padding, (0, 0)), constant_values=UNKNOWN),
    )


class TextReader(nnx.Module):
    """An encoder with linear heads that predict words and facts at every token."""

    def __init__(self, config: T5Config, num_facts: int, *, rngs: nnx.Rngs):
        self.encoder = T5Encoder(config, rngs=rngs)
        self.words = nnx.Linear(config.d_model, WORD_BUCKETS, rngs=rngs)
        self.facts = nnx.Linear(config.d_model, num_facts, rngs=rngs)

    def __call__(self, ids_bt: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns logits of words [B, T, WORD_BUCKETS] and of facts [B, T, F]."""
        features_btd = self.encoder(ids_bt, ids_bt != PAD_ID)
        features_nd = features_btd.reshape(-1, features_btd.shape[-1])
        words_nw, facts_nf = self.words(features_nd), self.facts(features_nd)
        return words_nw.reshape(*ids_bt.shape, -1), facts_nf.reshape(*ids_bt.shape, -1)


def reading_loss(model: TextReader, batch: Batch) -> jax.Array:
    """Returns the cross-entropy of words, masked or not, plus that of facts, in nats per byte."""
    words_btw, facts_btf = model(batch.ids)
    known_bt = batch.words != UNKNOWN
    words_bt = optax.softmax_cross_entropy_with_integer_labels(
        words_btw, jnp.where(known_bt, batch.words, 0)
    )
    facts_btf = optax.sigmoid_binary_cross_entropy(facts_btf, jnp.maximum(batch.facts, 0))
    facts_bt = facts_btf.sum(-1, where=batch.facts != UNKNOWN)
    return (
        MASKED_WEIGHT * _mean(words_bt, batch.masked)
        + _mean(words_bt, known_bt & ~batch.masked)
        + _mean(facts_bt, batch.ids != PAD_ID)
    )


def _mean(x: jax.Array, where: jax.Array) -> jax.Array:
    """Returns the mean of the selected elements, or 0 if none are selected."""
    return jnp.sum(x, where=where) / jnp.maximum(jnp.sum(where), 1)


def unit_scale(encoder: T5Encoder, texts: Iterable[np.ndarray]) -> None:
    """Sets the scale of the final norm so that every feature has a root mean square of 1.

    The objective does not fix a scale, and a network that reads the features learns little from
    features a tenth the size of the others.

    Args:
      texts: ids of texts like those that the encoder will see, int [n] each.
    """
    apply = nnx.jit(lambda encoder, ids_1t: encoder(ids_1t, ids_1t != PAD_ID))
    squares, count = 0.0, 0
    for ids in texts:
        padded = np.pad(ids, (0, -len(ids) % 64), constant_values=PAD_ID)
        features_td = np.asarray(apply(encoder, padded[None]))[0, : len(ids)]
        squares, count = squares + np.square(features_td).sum(0), count + len(ids)
    scale = encoder.final_norm.scale
    scale[...] = scale[...] / np.sqrt(squares / count)


def train(
    corpus: Corpus,
    config: T5Config,
    steps: int,
    learning_rate: float,
    seed: int,
    progress: Callable[[int, jax.Array], None],
) -> tuple[T5Encoder, dict[str, float]]:
    """Trains an encoder.

    Args:
      learning_rate: peak of AdamW's learning rate, after a warm-up and before a cosine decay.
      progress: called after each step with (steps done, loss).

    Returns:
      The encoder, and the held-out loss of each source.
    """
    model = TextReader(config, 2 * corpus.num_facts, rngs=nnx.Rngs(seed))
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
    for i in range(steps):
        params, opt_state, loss = step(params, opt_state, next(batches))
        progress(i + 1, loss)
    losses = {}
    loss_fn = jax.jit(loss_fn)
    for name, texts in corpus.heldout.items():
        batches = corpus.batches({name: texts}, np.random.default_rng(seed + 2))
        measured = [loss_fn(params, next(batches)) for _ in range(HELDOUT_BATCHES)]
        losses[name] = round(float(jnp.mean(jnp.stack(measured))), 4)
    encoder = nnx.merge(graphdef, params).encoder
    encode = ByteTokenizer().encode
    samples = [text.text for texts in corpus.heldout.values() for text in texts[:200]]
    unit_scale(encoder, [np.array(encode(text), np.int32) for text in samples])
    return encoder, losses
