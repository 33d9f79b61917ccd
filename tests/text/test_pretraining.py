"""Pre-training: labels, whole-word masking, learning, and the command that writes an encoder."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from imagen_jax.pretrain_text import FACTS, docstring_texts, symbol_texts
from imagen_jax.text import load_encoder
from imagen_jax.text.pretraining import (
    UNKNOWN,
    Batch,
    Text,
    TextReader,
    choose_masked,
    labeled,
    reading_loss,
    unit_scale,
    word_buckets,
)
from imagen_jax.text.t5 import PRESETS, T5Config
from imagen_jax.text.tokenizer import ByteTokenizer

VOCAB = 384
NUM_LABELS = 2 * len(FACTS)
TINY = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=VOCAB)


def label(text: Text, rng: np.random.Generator | None = None) -> Batch:
    return labeled(text, len(FACTS), VOCAB - 1, rng)


def batch_of(*texts: Text, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return Batch(*map(np.stack, zip(*(label(text, rng) for text in texts), strict=True)))


def test_each_byte_is_labeled_with_its_word():
    words = word_buckets("Red, red café")
    assert len(words) == len("Red, red café".encode())
    assert len(set(words[:3])) == 1 and words[0] == words[5] and words[0] != UNKNOWN
    assert (words[3:5] == UNKNOWN).all() and words[8] == UNKNOWN
    assert len(set(words[9:])) == 1 and words[9] != words[0]


@pytest.mark.parametrize("text", ["a", "a red circle", "...", "red red red", "é ü"])
def test_masking_covers_whole_words_and_at_least_one(text):
    words, rng = word_buckets(text), np.random.default_rng(0)
    for _ in range(30):
        masked = choose_masked(words, rng)
        assert masked.any() == (words != UNKNOWN).any()
        assert not masked[words == UNKNOWN].any()
        for part in np.split(masked, np.flatnonzero(words == UNKNOWN)):
            assert len(set(part[-1:])) == len(set(part[1:])) or len(part) < 2


def test_all_words_are_masked_at_the_same_rate():
    words, rng = word_buckets(" ".join(f"word{i}" for i in range(30))), np.random.default_rng(0)
    share = np.mean([choose_masked(words, rng) for _ in range(2000)], axis=0)
    np.testing.assert_allclose(share[words != UNKNOWN], 0.15, atol=0.03)


def test_known_facts_become_labels_of_every_byte_and_nothing_is_masked():
    [ids, words, masked, facts] = label(Text("a red star", [3, 5], [(2, 5, [5])]))
    assert not masked.any() and VOCAB - 1 not in ids and (words[2:5] != UNKNOWN).all()
    of_caption, of_thing = facts[:11, : len(FACTS)], facts[:11, len(FACTS) :]
    assert (of_caption.sum(1) == 2).all() and (of_caption[:, [3, 5]] == 1).all()
    assert (of_thing[2:5].sum(1) == 1).all() and (of_thing[2:5, 5] == 1).all()
    assert (of_thing[:2] == UNKNOWN).all() and (of_thing[5:] == UNKNOWN).all()
    assert (facts[11:] == UNKNOWN).all() and len(ids) == 64


def test_padding_does_not_change_the_loss():
    model = TextReader(TINY, NUM_LABELS, rngs=nnx.Rngs(0))
    for text in (Text("a red star"), Text("a red star", [3], [(2, 5, [3])])):
        batch = batch_of(text)
        fills = (0, UNKNOWN, False, UNKNOWN)
        padded = Batch(
            *(
                np.pad(part, [(0, 0), (0, 32), (0, 0)][: part.ndim], constant_values=fill)
                for part, fill in zip(batch, fills, strict=True)
            )
        )
        np.testing.assert_allclose(
            reading_loss(model, batch), reading_loss(model, padded), rtol=1e-5
        )


def test_words_and_facts_are_learned():
    model = TextReader(TINY, NUM_LABELS, rngs=nnx.Rngs(0))
    batch = batch_of(Text("red star", [0], [(0, 3, [0])]), Text("blue sun", [1], [(0, 4, [1])]))
    graphdef, params = nnx.split(model)
    optimizer = optax.adam(3e-2)
    loss_fn = jax.jit(jax.value_and_grad(lambda p: reading_loss(nnx.merge(graphdef, p), batch)))
    opt_state = optimizer.init(params)
    first, _ = loss_fn(params)
    for _ in range(60):
        loss, grads = loss_fn(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
    assert loss < 0.1 < 5 < first
    words, facts = nnx.merge(graphdef, params)(batch.ids)
    known = batch.words != UNKNOWN
    assert (words.argmax(-1) == batch.words)[known].all()
    assert ((facts > 0) == batch.facts)[batch.facts != UNKNOWN].all()


def test_unit_scale_gives_features_a_root_mean_square_of_one():
    encoder = TextReader(TINY, 1, rngs=nnx.Rngs(0)).encoder
    texts = [np.array(ByteTokenizer().encode(t)) for t in ("a red star", "two blue circles")]
    unit_scale(encoder, texts)
    features = [encoder(ids[None], np.ones((1, len(ids)), bool))[0] for ids in texts]
    np.testing.assert_allclose(np.square(np.concatenate(features)).mean(0), 1, rtol=1e-3)


def test_the_encoder_has_at_most_two_million_parameters():
    model = nnx.eval_shape(lambda: TextReader(PRESETS["byte-tiny"], 1, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model.encoder))) < 2_000_000


def test_the_local_texts_are_many_distinct_and_short():
    for texts, at_least in ((docstring_texts(), 10_000), (symbol_texts(), 3_000)):
        assert len(set(texts)) == len(texts) > at_least
        assert max(len(text.encode()) for text in texts) <= 180


def pretrain(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "imagen_jax.pretrain_text", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_command_writes_an_encoder_that_loads(tmp_path):
    done = pretrain(f"--out={tmp_path}/new", "--steps=2", "--captions=2000")
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout and "held-out loss" in done.stdout
    assert load_encoder(tmp_path / "new").encode(["a red circle"])[0].shape == (13, 128)


def test_the_command_refuses_a_file_as_its_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = pretrain(f"--out={tmp_path}/file")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: --out={tmp_path}/file cannot be")


def test_help_does_not_import_jax():
    code = "import sys, imagen_jax.pretrain_text; assert 'jax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
