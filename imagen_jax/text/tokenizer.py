"""Tokenizers: bytes, SentencePiece (T5), WordPiece (BERT), byte-pair encoding (CLIP).

A special token spelled out in a caption, such as </s>, is ordinary text and gets no special id.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from imagen_jax.common.errors import UserError, first_line
from imagen_jax.common.files import read_json, sha256

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
PAD_ID = 0
EOS_ID = 1
_RARE = "a \u16a0\ua000\u1c00"  # letters of three rare scripts: a word of no vocabulary
_NUM_SPECIAL = 3  # pad, end of sequence, unknown


class Tokenizer(Protocol):
    """The interface that an encoder needs.

    Attributes:
      name: kind of tokens.
      sha256: hash of the vocabulary's files and settings.
      vocab_size: upper bound of the ids, exclusive.
    """

    name: str
    sha256: str
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, including its start and end tokens.

        Raises:
          UserError: `text` holds half a surrogate pair, which has no UTF-8 form.
        """


def utf8(text: str) -> bytes:
    """Returns a text in UTF-8. Raises UserError if it has no UTF-8 form."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"text {text!r}: not valid Unicode, {e.reason}") from e


class ByteTokenizer:
    """UTF-8 bytes as tokens, with the ids of seqio.ByteVocabulary and ByT5 (arXiv:2105.13626).

    It needs no vocabulary file. It does not use seqio, because seqio imports TensorFlow, which
    takes longer than encoding.
    """

    name = "bytes"
    sha256 = sha256([])
    vocab_size = 256 + _NUM_SPECIAL

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` and the end-of-sequence id, as every T5 input has."""
        return [byte + _NUM_SPECIAL for byte in utf8(text)] + [EOS_ID]


class SentencePieceTokenizer:
    """Pieces of a SentencePiece model (arXiv:1808.06226), the format of T5's vocabularies."""

    name = "sentencepiece"

    def __init__(self, path: Path):
        """Loads the model at `path`. Raises UserError unless it has T5's end-of-sequence id."""
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())
        except RuntimeError as e:
            raise UserError(f"{path}: not a SentencePiece model") from e
        if self._processor.eos_id() != EOS_ID:
            raise UserError(
                f"{path}: its end-of-sequence id is {self._processor.eos_id()}; T5's is {EOS_ID}"
            )
        self.sha256 = sha256([path])
        self.vocab_size = self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text` and the end-of-sequence id, as every T5 input has."""
        utf8(text)
        return [*self._processor.encode(text), EOS_ID]


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library, which adds the start and end tokens."""

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer, sha256: str):
        self.name = name
        self.sha256 = sha256
        self.vocab_size = tokenizer.get_vocab_size()
        self._tokenizer = tokenizer
        # Without its token for unknown text, a vocabulary fails only at the first such caption.
        self.encode(_RARE)

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, including its start and end tokens."""
        utf8(text)
        return self._tokenizer.encode(text).ids


def _library_file(name: str) -> Callable[..., LibraryTokenizer]:
    """Returns a loader for tokenizer.json, which holds the vocabulary and all settings."""

    def load(path: Path) -> LibraryTokenizer:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return LibraryTokenizer(name, tokenizer, sha256([path]))

    return load


def _wordpiece(vocab: Path) -> LibraryTokenizer:
    """Builds BERT's tokenizer: splits words and punctuation greedily into the longest pieces."""
    settings = _settings(vocab.parent, _WORDPIECE_SETTINGS)
    tokenizer = tokenizers.Tokenizer(models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings["do_lower_case"],
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = _start_and_end(tokenizer, vocab, "[CLS]", "[SEP]")
    digest = sha256([vocab], more=json.dumps(settings, sort_keys=True).encode())
    return LibraryTokenizer("wordpiece", tokenizer, digest)


def _bpe(vocab: Path, merges: Path) -> LibraryTokenizer:
    """Builds CLIP's tokenizer: lowercases, splits into words, digits and symbols, merges bytes."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    model = models.BPE.from_file(
        str(vocab), str(merges), end_of_word_suffix="</w>", unk_token=end, fuse_unk=False
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.post_processor = _start_and_end(tokenizer, vocab, start, end)
    return LibraryTokenizer("bpe", tokenizer, sha256([vocab, merges]))


def _start_and_end(
    tokenizer: tokenizers.Tokenizer, vocab: Path, first: str, last: str
) -> processors.TemplateProcessing:
    """Returns a post-processor that adds one token before and one after each text."""
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    for token, token_id in ids:
        if token_id is None:
            raise UserError(f"{vocab}: token {token!r} is missing")
    return processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)


# Fields of tokenizer_config.json that matter, with their defaults.
_WORDPIECE_SETTINGS = {
    "do_lower_case": True,
    "tokenize_chinese_chars": True,
    "strip_accents": None,
}


def _settings(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG_FILE
    found = read_json(path) if path.is_file() else {}
    return {name: found.get(name, default) for name, default in defaults.items()}


# Keyed by tokenizer_class: sets of vocabulary files, in order of preference.
TOKENIZERS: Mapping[str, Mapping[tuple[str, ...], Callable[..., Tokenizer]]] = {
    "ByT5Tokenizer": {(): ByteTokenizer},
    "T5Tokenizer": {
        ("spiece.model",): SentencePieceTokenizer,
        ("sentencepiece.model",): SentencePieceTokenizer,
        ("tokenizer.json",): _library_file("sentencepiece"),
    },
    "BertTokenizer": {
        ("vocab.txt",): _wordpiece,
        ("tokenizer.json",): _library_file("wordpiece"),
    },
    "CLIPTokenizer": {
        ("vocab.json", "merges.txt"): _bpe,
        ("tokenizer.json",): _library_file("bpe"),
    },
}


def load_tokenizer(folder: Path, kind: str) -> Tokenizer:
    """Loads the tokenizer of an encoder's folder. `kind` is a key of TOKENIZERS.

    Raises:
      UserError: `kind` is unknown, or the files are missing or damaged.
    """
    if kind not in TOKENIZERS:
        raise UserError(
            f"text encoder {str(folder)!r}: tokenizer_class is {kind!r}; "
            f"supported: {', '.join(TOKENIZERS)}"
        )
    for names, load in TOKENIZERS[kind].items():
        paths = [folder / name for name in names]
        if all(path.is_file() for path in paths):
            try:
                return load(*paths)
            except UserError:
                raise
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as e:  # the libraries raise nothing narrower, not even Exception
                raise UserError(f"{paths[0]}: not a vocabulary of {kind}: {first_line(e)}") from e
    expected = " or ".join(" + ".join(names) for names in TOKENIZERS[kind])
    raise UserError(f"text encoder {str(folder)!r}: no vocabulary; {kind} needs {expected}")
