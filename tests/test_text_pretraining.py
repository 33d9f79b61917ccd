"""Span corruption loses nothing, the predictor does not peek, and the script writes an encoder."""

from __future__ import annotations

import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from data_pipelines.pretrain_text import docstring_texts, symbol_texts
from data_pipelines.scenes.claims import spelled_out
from imagen_jax.text import load_encoder
from imagen_jax.text.pretraining import SpanPredictor, corrupt_spans, span_loss, take_ending
from imagen_jax.text.t5 import PRESETS, T5Config
from imagen_jax.text.tokenizer import EOS_ID

VOCAB = 384
TINY = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=VOCAB)


def restored(inputs: np.ndarray, targets: np.ndarray) -> list[int]:
    """The text that went into `corrupt_spans`: each sentinel replaced by its span."""
    spans: dict[int, list[int]] = {}
    for token in targets[:-1].tolist():
        if token >= 259:
            current = spans.setdefault(token, [])
        else:
            current.append(token)
    return [t for token in inputs[:-1].tolist() for t in spans.get(token, [token])]


@pytest.mark.parametrize("length", [2, 3, 20, 63, 180, 400])
def test_inputs_and_targets_hold_the_whole_text(length):
    rng = np.random.default_rng(length)
    for _ in range(50):
        ids = rng.integers(3, 259, length).astype(np.int32)
        inputs, targets = corrupt_spans(ids, VOCAB, rng)
        assert inputs[-1] == targets[-1] == EOS_ID
        assert restored(inputs, targets) == ids.tolist()
        sentinels = inputs[inputs >= 259]
        assert sentinels.tolist() == list(range(VOCAB - 1, VOCAB - 1 - len(sentinels), -1))
        assert (targets < 259).sum() - 1 == max(1, round(0.15 * length))


def test_an_ending_is_one_span():
    ids = np.arange(3, 23).astype(np.int32)
    inputs, targets = take_ending(ids, 12, VOCAB)
    assert inputs.tolist() == [*range(3, 15), VOCAB - 1, EOS_ID]
    assert targets.tolist() == [VOCAB - 1, *range(15, 23), EOS_ID]
    assert restored(inputs, targets) == ids.tolist()


def test_claims_are_spelled_out():
    claims = [
        {"kind": "object", "object": {"shape": "circle", "color": "red"}},
        {"kind": "size", "object": {"shape": "circle", "color": "red"}, "size": "large"},
        {"kind": "count", "object": {"shape": "star"}, "count": 2},
        {"kind": "relation", "a": {"shape": "star"}, "b": {"word": "CAT"}, "relation": "above"},
        {"kind": "word", "word": "CAT", "color": "blue"},
        {"kind": "background", "color": "navy"},
    ]
    assert spelled_out(claims) == (
        'red circle; large circle; 2 stars; star above "CAT"; blue "CAT"; navy background'
    )


def test_every_position_is_taken_equally_often():
    rng = np.random.default_rng(0)
    ids = np.arange(3, 63)
    kept = np.concatenate([corrupt_spans(ids, VOCAB, rng)[0] for _ in range(4000)])
    counts = 4000 - np.bincount(kept, minlength=63)[3:63]
    np.testing.assert_allclose(counts / 4000, 0.15, atol=0.03)


def test_a_prediction_sees_only_the_targets_before_it():
    model = SpanPredictor(TINY, 2, rngs=nnx.Rngs(0))
    inputs = np.array([[5, 6, 383, 7, 1]])
    targets = np.array([[383, 40, 41, 42, 1]])
    changed = np.array([[383, 40, 99, 42, 1]])
    difference = np.abs(model(inputs, targets) - model(inputs, changed)).max(axis=(0, 2))
    assert difference[:3].max() < 1e-5 < 1e-3 < difference[3:].min()


def test_padding_does_not_change_the_loss():
    model = SpanPredictor(TINY, 2, rngs=nnx.Rngs(0))
    inputs, targets = np.array([[5, 6, 383, 7, 1]]), np.array([[383, 40, 41, 1]])
    padded = np.pad(inputs, ((0, 0), (0, 3))), np.pad(targets, ((0, 0), (0, 4)))
    np.testing.assert_allclose(
        span_loss(model, inputs, targets), span_loss(model, *padded), rtol=1e-5
    )


def test_the_model_that_is_trained_has_at_most_two_million_parameters():
    model = nnx.eval_shape(lambda: SpanPredictor(PRESETS["byte-tiny"], 2, rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) < 2_000_000


def test_the_texts_at_hand_are_plenty_distinct_and_short():
    for texts, at_least in ((docstring_texts(), 10_000), (symbol_texts(), 3_000)):
        assert len(set(texts)) == len(texts) > at_least
        assert max(len(text.text.encode()) for text in texts) <= 180


def pretrain(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "data_pipelines.pretrain_text", *args]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_script_writes_an_encoder_that_loads(tmp_path):
    done = pretrain(f"--out={tmp_path}/new", "--steps=2", "--captions=2000")
    assert done.returncode == 0, done.stderr
    assert "step 2/2" in done.stdout and "held-out loss" in done.stdout
    assert load_encoder(tmp_path / "new").encode(["a red circle"])[0].shape == (13, 128)


def test_the_script_refuses_a_file_as_its_folder(tmp_path):
    (tmp_path / "file").write_text("")
    done = pretrain(f"--out={tmp_path}/file")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: --out={tmp_path}/file is a file")
