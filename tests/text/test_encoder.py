"""The text encoder: reproducible embeddings, truncation, identity, and the bundled weights."""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tqdm import tqdm

from imagen_jax.common.errors import UserError
from imagen_jax.text import TextEncoder, encoder, encoder_identity, load_encoder
from imagen_jax.text.hf_format import WEIGHTS_FILE, load_t5, save_t5
from imagen_jax.text.t5 import PRESETS, T5Config, T5Encoder
from imagen_jax.text.tokenizer import EOS_ID, ByteTokenizer

FILLERS = [f"{number} green triangles over a white square" for number in range(70)]


@pytest.fixture(scope="module")
def bundled():
    return load_encoder()


def tiny_encoder(max_tokens: int = 192) -> TextEncoder:
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=384)
    return TextEncoder(T5Encoder(config, rngs=nnx.Rngs(0)), ByteTokenizer(), max_tokens, {})


def test_embeddings_are_ragged_and_in_bfloat16(bundled):
    captions = ["", "a red circle", "é", "x" * 191]
    embeddings = bundled.encode(captions)
    assert [e.shape for e in embeddings] == [(n, bundled.dim) for n in (1, 13, 3, 192)]
    assert [bundled.num_tokens(c) for c in captions] == [1, 13, 3, 192]
    assert all(e.dtype == ml_dtypes.bfloat16 for e in embeddings)


def test_an_embedding_has_the_same_bits_in_any_batch(bundled):
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


def test_a_caption_that_is_too_long_is_refused_with_its_length():
    encoder = tiny_encoder(max_tokens=10)
    assert encoder.encode(["123456789"])[0].shape == (10, 16)
    with pytest.raises(UserError, match="'1234567890' has 11 tokens; max_tokens allows 10"):
        encoder.encode(["short", "1234567890"])
    with pytest.raises(UserError, match="has 11 tokens"):
        encoder.check(["short", "1234567890"])


@pytest.mark.parametrize(
    ("caption", "fits"),
    [
        ("a circle", "a circle"),
        ("123456789", "123456789"),
        ("a red circle", "a red"),
        ("a circles and", "a circles"),
        ("1234567890 words", "123456789"),
        ("größer als", "größer"),
        ("ßßßßßß", "ßßßß"),
    ],
)
def test_a_caption_is_truncated_to_whole_words_on_request(caption, fits):
    encoder = tiny_encoder(max_tokens=10)
    assert encoder.truncate(caption) == fits
    encoder.check([caption], truncate=True)
    found, expected = encoder.encode([caption, fits], truncate=True)
    np.testing.assert_array_equal(found, expected)
    assert len(found) == len(fits.encode()) + 1 <= 10


def test_a_truncated_caption_keeps_its_end_of_sequence_token(monkeypatch):
    encoder, seen = tiny_encoder(max_tokens=10), []
    call = TextEncoder.__call__
    monkeypatch.setattr(
        TextEncoder,
        "__call__",
        lambda self, ids_bt, mask_bt: seen.append(ids_bt) or call(self, ids_bt, mask_bt),
    )
    encoder.encode(["a red circle"], truncate=True)
    assert seen[0][0].tolist() == [*ByteTokenizer().encode("a red")] + [0] * 10
    assert ByteTokenizer().encode("a red")[-1] == EOS_ID


def test_truncation_still_refuses_what_cannot_be_encoded():
    with pytest.raises(UserError, match="not valid Unicode"):
        tiny_encoder(max_tokens=10).check(["a very long text \ud83d"], truncate=True)
    encoder = tiny_encoder(max_tokens=0)  # not even the end-of-sequence token fits
    with pytest.raises(UserError, match="max_tokens allows 0"):
        encoder.encode(["a"], truncate=True)


def test_the_memory_line_does_not_tear_a_progress_bar(capfd):
    log, handler = logging.getLogger("imagen_jax"), logging.StreamHandler(sys.stderr)
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        with tqdm(total=2, desc="working", file=sys.stderr) as bar:
            bar.update()
            load_encoder("byte-tiny-random")
    finally:
        log.removeHandler(handler)
        log.setLevel(logging.NOTSET)
    [line] = [s for s in capfd.readouterr().err.split("\n") if "GB of weights" in s]
    assert line.rpartition("\r")[2].startswith("text encoder byte-tiny-random: ")


def test_random_weights_are_reproducible_and_have_their_own_identity(bundled):
    first, again = load_encoder("byte-tiny-random"), load_encoder("byte-tiny-random")
    [embedding], [same] = first.encode(["a red circle"]), again.encode(["a red circle"])
    np.testing.assert_array_equal(embedding, same)
    assert embedding.shape == (13, bundled.dim)
    assert np.square(embedding.astype(np.float32)).mean() == pytest.approx(1, abs=0.05)
    assert first.identity == again.identity == encoder_identity("byte-tiny-random")
    differing = {k for k in first.identity if first.identity[k] != bundled.identity[k]}
    assert differing == {"encoder", "weights_sha256"}
    assert first.identity["encoder"] == "byte-tiny-random"


def test_a_folder_can_be_loaded_with_random_weights(tmp_path):
    folder = tmp_path / "mine"
    config = T5Config(d_model=16, d_kv=4, d_ff=24, num_layers=1, num_heads=4, vocab_size=384)
    model, extra = T5Encoder(config, rngs=nnx.Rngs(1)), {"tokenizer_class": "ByT5Tokenizer"}
    save_t5(model, folder, dtype=np.float32, extra=extra)
    read, random = load_encoder(folder), load_encoder(f"{folder}-random")
    assert random.identity["encoder"] == "mine-random"
    assert random.identity == encoder_identity(f"{folder}-random")
    [a], [b] = read.encode(["a red circle"]), random.encode(["a red circle"])
    assert a.shape == b.shape and (a != b).any()
    shallow = folder.rename(tmp_path / "mine-random")  # a folder of that name wins
    assert load_encoder(shallow).identity == {**read.identity, "encoder": "mine-random"}
    assert encoder_identity(f"{folder}-random") == load_encoder(shallow).identity
    assert encoder_identity(folder) is None


def test_the_bundled_files_match_the_preset_and_the_identity(bundled):
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


def test_the_identity_does_not_need_the_weights(bundled, monkeypatch):
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
    for name in ("google/t5-v1_1-base", "byte-huge", "byte-huge-random", "byte-tiny-float8"):
        with pytest.raises(UserError, match=f"'{name}' is not a folder, and not bundled") as error:
            load_encoder(name)
        message = str(error.value)
        for words in ("byte-tiny", "Nothing is downloaded", "docs/text.md", "-random or -bfloat"):
            assert words in message
        assert "\n" not in message
    with pytest.raises(UserError, match="max_tokens is 0"):
        load_encoder(max_tokens=0)
    t5 = T5Encoder(PRESETS["byte-tiny"], rngs=nnx.Rngs(0))
    save_t5(t5, tmp_path, dtype=np.float32, extra={"tokenizer_class": "LlamaTokenizer"})
    with pytest.raises(UserError, match="'LlamaTokenizer'; supported: ByT5Tokenizer, T5Tokenizer"):
        load_encoder(tmp_path)


def test_matmuls_run_in_full_float32_precision(bundled):
    hlo = bundled._apply.lower(
        bundled._weights, np.zeros((1, 4), np.int32), np.ones((1, 4), bool)
    ).as_text()
    dots = [line for line in hlo.splitlines() if "dot_general" in line]
    assert dots and all("HIGHEST" in line for line in dots)


def test_importing_the_encoder_does_not_import_tensorflow():
    code = "import sys, imagen_jax.text; assert 'tensorflow' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
