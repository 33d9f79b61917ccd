"""Tokenizers and embeddings match transformers, with vocabularies trained in the test."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, normalizers, pre_tokenizers, trainers

from imagen_jax.text import load_encoder
from imagen_jax.text.tokenizer import ByteTokenizer, load_tokenizer

transformers = pytest.importorskip("transformers")

AWKWARD = [
    "",
    " ",
    "a red circle on a blue square",
    "  two  spaces \u3000 and\u00a0wide ones\u200b ",
    "naïve café, Straße, Ω ≈ ½, ﬁne, İstanbul, ǅ, \uff12",
    "赤い円と青い正方形, 빨간 원",
    "🦊🏳️‍🌈👩🏽‍🚀 foxes",
    "tabs\tnew\nlines\r\x00null\x7f\x1b[0m",
    "e\u0301 against \u00e9, \u202eright to left\u202c, \ufeffmark, \U0010ffff",
    "I'll, you've, they'RE; it's 3.14 (or 1,000,000)!?... _under_score",
    "red blue unknownword " * 700,
    "supercalifragilisticexpialidocious" * 10,
]

SIZES = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48,
}  # fmt: skip


def corpus() -> list[str]:
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(300)]
    return AWKWARD[:-2] + [" ".join(rng.choices(words, k=12)) for _ in range(300)]


def train_t5(folder):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=300, minloglevel=2,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())


def train_bert(folder, lowercase=True):
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(corpus(), trainer)
    vocab = tokenizer.get_vocab()
    (folder / "vocab.txt").write_text("".join(f"{t}\n" for t in sorted(vocab, key=vocab.get)))


def train_cased_bert(folder):
    train_bert(folder, lowercase=False)
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))


def train_clip(folder):
    special = ["<|startoftext|>", "<|endoftext|>"]
    model = models.BPE(unk_token=special[1], end_of_word_suffix="</w>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, end_of_word_suffix="</w>", show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.model.save(str(folder))


def assert_same_ids(ours, theirs) -> None:
    for text in AWKWARD:
        assert ours.encode(text) == theirs(text)["input_ids"], text[:50]


@pytest.mark.parametrize(
    "kind, train",
    [
        ("T5Tokenizer", train_t5),
        ("BertTokenizer", train_bert),
        ("BertTokenizer", train_cased_bert),
        ("CLIPTokenizer", train_clip),
    ],
)
def test_ids_match(kind, train, tmp_path):
    train(tmp_path)
    theirs = getattr(transformers, kind).from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path, kind)
    assert_same_ids(ours, theirs)
    saved = tmp_path / "saved"
    theirs.save_pretrained(saved)
    assert {f.name for f in saved.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    again = load_tokenizer(saved, kind)
    assert_same_ids(again, theirs)
    assert again.name == ours.name and again.sha256 != ours.sha256


def test_byte_ids_match():
    assert_same_ids(ByteTokenizer(), transformers.ByT5Tokenizer())


@pytest.mark.parametrize(
    "model, tokenizer, train, sizes",
    [
        ("T5EncoderModel", "T5Tokenizer", train_t5, {"d_model": 32, "d_ff": 48, "num_layers": 2}),
        ("MT5EncoderModel", "T5Tokenizer", train_t5, {"d_model": 32, "d_ff": 48, "num_layers": 2}),
        ("BertModel", "BertTokenizer", train_bert, SIZES),
        ("CLIPTextModel", "CLIPTokenizer", train_clip, {**SIZES, "eos_token_id": 1}),
    ],
)
def test_embeddings_from_a_folder_match(model, tokenizer, train, sizes, tmp_path):
    torch = pytest.importorskip("torch")
    train(tmp_path)
    tokenizer = getattr(transformers, tokenizer).from_pretrained(tmp_path)
    model_class = getattr(transformers, model)
    torch.manual_seed(0)
    theirs = model_class(model_class.config_class(**sizes, vocab_size=len(tokenizer))).eval()
    theirs.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    captions = ["a red circle on a blue square", "", "naïve 赤い円 🦊"]
    for caption, found in zip(captions, load_encoder(tmp_path, 64).encode(captions), strict=True):
        with torch.no_grad():
            out = theirs(**tokenizer(caption, return_tensors="pt"), output_hidden_states=True)
        expected = out.hidden_states[-2] if "CLIP" in model else out.last_hidden_state
        np.testing.assert_allclose(found.astype(np.float32), expected[0].numpy(), atol=0.02)
