"""The text encoder: the same embedding for a caption in any company, and the bundled weights."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from imagen_jax.common.errors import UserError
from imagen_jax.text import TextEncoder, encoder, encoder_identity, load_encoder
from imagen_jax.text.hf_format import WEIGHTS_FILE, load_t5, save_t5
from imagen_jax.text.t5 import PRESETS, T5Config, T5Encoder
from imagen_jax.text.tokenizer import ByteTokenizer

FILLERS = [f"{number} green triangles over a white square" for number in range(70)]


@pytest.fixture(scope="module")
def bundled():
    return load_encoder()


def tiny_encoder(max_tokens: int = 192) -> TextEncoder:
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=384)
    return TextEncoder(T5Encoder(config, rngs=nnx.Rngs(0)), ByteTokenizer(), max_tokens, {})


def test_outputs_are_ragged_and_in_bfloat16(bundled):
    captions = ["", "a red circle", "é", "x" * 191]
    embeddings = bundled.encode(captions)
    assert [e.shape for e in embeddings] == [(n, bundled.dim) for n in (1, 13, 3, 192)]
    assert [bundled.num_tokens(c) for c in captions] == [1, 13, 3, 192]
    assert all(e.dtype == ml_dtypes.bfloat16 for e in embeddings)


def test_a_caption_gets_the_same_bits_in_any_batch(bundled):
    captions = ["a red circle", "x" * 63, "x" * 64, "a blue square " * 10]
    alone = [bundled.encode([caption])[0] for caption in captions]
    for before in (1, 30, 70):  # first, last and later batches; different neighbors
        mixed = bundled.encode([*FILLERS[:before], *captions, *FILLERS[before:]])
        for expected, found in zip(alone, mixed[before:], strict=False):
            np.testing.assert_array_equal(expected, found)


def test_max_tokens_does_not_change_an_embedding(bundled):
    [expected] = bundled.encode(["a red circle"])
    [found] = load_encoder(max_tokens=13).encode(["a red circle"])
    np.testing.assert_array_equal(expected, found)


def test_equal_captions_are_encoded_once_and_progress_counts_distinct_ones():
    calls = []
    captions = [*FILLERS, *FILLERS, "a" * 100]
    embeddings = tiny_encoder().encode(captions, lambda *done_total: calls.append(done_total))
    assert calls == [(32, 71), (64, 71), (70, 71), (71, 71)]
    assert embeddings[0] is embeddings[70]
    assert len(embeddings) == len(captions)


def test_no_captions_give_no_embeddings():
    assert tiny_encoder().encode([]) == []


def test_a_caption_too_long_is_refused_with_its_length():
    encoder = tiny_encoder(max_tokens=10)
    assert encoder.encode(["123456789"])[0].shape == (10, 16)
    with pytest.raises(UserError, match="'1234567890' has 11 tokens; max_tokens allows 10"):
        encoder.encode(["short", "1234567890"])


def test_random_weights_are_always_the_same_and_another_encoder(bundled):
    drawn, again = load_encoder("byte-tiny-random"), load_encoder("byte-tiny-random")
    [embedding], [same] = drawn.encode(["a red circle"]), again.encode(["a red circle"])
    np.testing.assert_array_equal(embedding, same)
    assert embedding.shape == (13, bundled.dim)
    assert np.square(embedding.astype(np.float32)).mean() == pytest.approx(1, abs=0.05)
    assert drawn.identity == again.identity == encoder_identity("byte-tiny-random")
    differing = {k for k in drawn.identity if drawn.identity[k] != bundled.identity[k]}
    assert differing == {"encoder", "weights_sha256"}
    assert drawn.identity["encoder"] == "byte-tiny-random"


def test_any_folder_may_be_taken_at_random(tmp_path):
    folder = tmp_path / "mine"
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=384)
    model, extra = T5Encoder(config, rngs=nnx.Rngs(1)), {"tokenizer_class": "ByT5Tokenizer"}
    save_t5(model, folder, dtype=np.float32, extra=extra)
    read, drawn = load_encoder(folder), load_encoder(f"{folder}-random")
    assert drawn.identity["encoder"] == "mine-random"
    assert drawn.identity == encoder_identity(f"{folder}-random")
    [a], [b] = read.encode(["a red circle"]), drawn.encode(["a red circle"])
    assert a.shape == b.shape and (a != b).any()
    shallow = folder.rename(tmp_path / "mine-random")  # a folder of that name comes first
    assert load_encoder(shallow).identity == {**read.identity, "encoder": "mine-random"}
    assert encoder_identity(f"{folder}-random") == load_encoder(shallow).identity
    assert encoder_identity(folder) is None


def test_the_bundled_encoder_is_what_its_files_say(bundled):
    folder = encoder.BUNDLED / "byte-tiny"
    assert load_t5(folder).config == PRESETS["byte-tiny"]
    assert (folder / WEIGHTS_FILE).stat().st_size < 2_500_000
    assert json.loads(json.dumps(bundled.identity)) == bundled.identity
    assert {**bundled.identity, "weights_sha256": None} == {
        "encoder": "byte-tiny",
        "weights_sha256": None,
        "tokenizer": "bytes",
        "tokenizer_sha256": hashlib.sha256(b"").hexdigest(),
        "max_tokens": 192,
        "dim": 128,
        "dtype": "bfloat16",
    }


def test_the_identity_is_known_without_the_weights(bundled, monkeypatch):
    monkeypatch.delattr(encoder.Checkpoint, "load")
    assert encoder_identity("byte-tiny") == bundled.identity
    assert encoder_identity("byte-tiny", 64) == {**bundled.identity, "max_tokens": 64}
    assert encoder_identity("t5-v1_1-xxl") is None


@pytest.mark.parametrize(
    ("tokens", "bucket"), [(1, 16), (16, 16), (17, 24), (25, 32), (33, 48), (97, 128), (129, 192)]
)
def test_lengths_are_rounded_up_by_less_than_half(tokens, bucket):
    assert encoder._bucket(tokens) == bucket


def test_the_bundled_embeddings_have_unit_scale(bundled):
    embedding = np.concatenate(bundled.encode(["a red circle", *FILLERS])).astype(np.float32)
    assert 0.2 < np.sqrt(np.mean(embedding**2)) < 5


def test_an_encoder_from_a_folder_is_named_after_it(tmp_path):
    t5 = T5Encoder(PRESETS["byte-tiny"], rngs=nnx.Rngs(0))
    for name in ("one", "two"):
        folder = tmp_path / name
        save_t5(t5, folder, dtype=np.float32, extra={"tokenizer_class": "ByT5Tokenizer"})
        t5.final_norm.scale[...] *= 2
    one, two = load_encoder(tmp_path / "one"), load_encoder(str(tmp_path / "two"))
    assert (one.identity["encoder"], two.identity["encoder"]) == ("one", "two")
    assert one.identity["weights_sha256"] != two.identity["weights_sha256"]
    once, twice = one.encode(["a"])[0], two.encode(["a"])[0]
    np.testing.assert_array_equal(2 * once.astype(np.float32), twice.astype(np.float32))


def test_unknown_names_tokenizers_and_lengths_are_refused(tmp_path):
    for name in ("byte-huge", "byte-huge-random", "byte-tiny-float8"):
        with pytest.raises(
            UserError, match=f"'{name}': neither a folder nor one of byte-tiny.* -random or -bfloat"
        ):
            load_encoder(name)
    with pytest.raises(UserError, match="max_tokens is 0"):
        load_encoder(max_tokens=0)
    t5 = T5Encoder(PRESETS["byte-tiny"], rngs=nnx.Rngs(0))
    save_t5(t5, tmp_path, dtype=np.float32, extra={"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(UserError, match="'LlamaTokenizer'; supported: ByT5Tokenizer, T5Tokenizer"):
        load_encoder(tmp_path)


def test_matmuls_keep_float32_precision_on_accelerators(bundled):
    hlo = bundled._apply.lower(
        bundled._weights, np.zeros((1, 4), np.int32), np.ones((1, 4), bool)
    ).as_text()
    dots = [line for line in hlo.splitlines() if "dot_general" in line]
    assert dots and all("HIGHEST" in line for line in dots)


def test_importing_the_encoder_brings_no_tensorflow():
    code = "import sys, imagen_jax.text; assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
