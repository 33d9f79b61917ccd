"""Token ids match seqio for bytes and SentencePiece; special tokens in captions are text."""

from __future__ import annotations

import io

import pytest
import sentencepiece
import tokenizers

from imagen_jax.common.errors import UserError
from imagen_jax.text.tokenizer import EOS_ID, ByteTokenizer, load_tokenizer

AWKWARD = [
    "",
    " ",
    "a red circle",
    "naïve café, Straße, Ω ≈ ½",
    "赤い円と青い正方形",
    "🦊🏳️‍🌈👩🏽‍🚀",
    "tabs\tnew\nlines\r\x00null\x7f\x1b[0m",
    "e\u0301 against \u00e9, \u202eright to left\u202c, \ufeffmark, \U0010ffff",
    "<extra_id_0> </s> <pad>",
    "x" * 300,
]


@pytest.mark.parametrize("text", AWKWARD)
def test_byte_ids_match_seqio(text):
    seqio = pytest.importorskip("seqio")
    vocabulary = seqio.ByteVocabulary()
    assert ByteTokenizer().encode(text) == [*vocabulary.encode(text), vocabulary.eos_id]


def test_each_byte_is_a_token_and_the_last_token_is_end_of_sequence():
    assert ByteTokenizer().encode("aé") == [ord("a") + 3, 0xC3 + 3, 0xA9 + 3, EOS_ID]


def test_a_lone_surrogate_is_refused():
    with pytest.raises(UserError, match=r"'\\ud83d' *: not valid Unicode"):
        ByteTokenizer().encode("\ud83d")


def train_sentencepiece(folder, **special):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*AWKWARD[2:-1], "many more words of English text"]),
        model_writer=model, vocab_size=100, hard_vocab_limit=False, minloglevel=2, **special,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model.getvalue())


def test_sentencepiece_ids_match_seqio(tmp_path):
    seqio = pytest.importorskip("seqio")
    train_sentencepiece(tmp_path, pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    vocabulary = seqio.SentencePieceVocabulary(str(tmp_path / "spiece.model"), extra_ids=0)
    tokenizer = load_tokenizer(tmp_path, "T5Tokenizer")
    assert tokenizer.vocab_size == vocabulary.vocab_size
    for text in [*AWKWARD, "a red circle " * 700]:
        assert tokenizer.encode(text) == [*vocabulary.encode(text), vocabulary.eos_id]
    with pytest.raises(UserError, match="not valid Unicode"):
        tokenizer.encode("\ud83d")


def test_a_vocabulary_with_other_special_ids_is_refused(tmp_path):
    train_sentencepiece(tmp_path)  # SentencePiece's default order: unknown, begin, end
    with pytest.raises(UserError, match="its end-of-sequence id is 2; T5's is 1"):
        load_tokenizer(tmp_path, "T5Tokenizer")


def test_a_special_token_in_a_caption_is_text(tmp_path):
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[", "]", "sep", "a"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens) + "\n")
    assert load_tokenizer(tmp_path, "BertTokenizer").encode("A [SEP]") == [2, 7, 4, 6, 5, 3]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert load_tokenizer(tmp_path, "BertTokenizer").encode("A a") == [2, 1, 7, 3]


def test_a_vocabulary_without_start_and_end_tokens_is_refused(tmp_path):
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\na\n")
    with pytest.raises(UserError, match=r"token '\[SEP\]' is missing"):
        load_tokenizer(tmp_path, "BertTokenizer")


@pytest.mark.parametrize("file", ["vocab.txt", "tokenizer.json"])
def test_a_vocabulary_without_its_token_for_unknown_text_is_refused_when_it_is_loaded(
    tmp_path, file
):
    tokens = ["[PAD]", "[CLS]", "[SEP]", "a"]
    if file == "vocab.txt":
        (tmp_path / file).write_text("\n".join(tokens) + "\n")
    else:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
        tokenizers.Tokenizer(model).save(str(tmp_path / file))
    with pytest.raises(UserError, match=f"{file}: not a vocabulary of BertTokenizer") as e:
        load_tokenizer(tmp_path, "BertTokenizer")
    assert "\n" not in str(e.value)
