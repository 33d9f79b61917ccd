"""Text to token ids: bytes, SentencePiece (T5), WordPiece (BERT), byte-pair encoding (CLIP).

Captions are text: a special token written out in one, such as </s>, is spelled like any word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import sentencepiece
import tokenizers
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors

from imagen_jax.common.errors import UserError
from imagen_jax.common.files import first_line, read_json, sha256

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
PAD_ID = 0
EOS_ID = 1
_NUM_SPECIAL = 3  # pad, end of sequence, unknown


class Tokenizer(Protocol):
    """What an encoder needs of a tokenizer.

    Attributes:
        name: the kind of tokens.
        sha256: of the vocabulary's files and settings.
        vocab_size: ids are below it.
    """

    name: str
    sha256: str
    vocab_size: int

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with those that mark its beginning and end.

        Raises:
            UserError: `text` holds half a surrogate pair, which has no UTF-8 form.
        """


def utf8(text: str) -> bytes:
    """The UTF-8 form of a text; raises UserError if it has none."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise UserError(f"text {text!r}: not valid Unicode, {e.reason}") from e


class ByteTokenizer:
    """UTF-8 bytes as tokens: the ids of seqio.ByteVocabulary and ByT5 (arXiv:2105.13626).

    It needs no vocabulary file, so it is what works out of the box. Written out because importing
    seqio brings TensorFlow, which takes longer than encoding.
    """

    name = "bytes"
    sha256 = sha256([])
    vocab_size = 256 + _NUM_SPECIAL

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and the end-of-sequence id, which every T5 input carries."""
        return [byte + _NUM_SPECIAL for byte in utf8(text)] + [EOS_ID]


class SentencePieceTokenizer:
    """The pieces of a SentencePiece model, as T5's vocabularies are (arXiv:1808.06226)."""

    name = "sentencepiece"

    def __init__(self, path: Path):
        """Raises UserError unless `path` holds a model with T5's end-of-sequence id."""
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
        """The ids of `text` and the end-of-sequence id, which every T5 input carries."""
        utf8(text)
        return [*self._processor.encode(text), EOS_ID]


class LibraryTokenizer:
    """A tokenizer of the `tokenizers` library, which adds its own marks of beginning and end."""

    def __init__(self, name: str, tokenizer: tokenizers.Tokenizer, sha256: str):
        self.name = name
        self.sha256 = sha256
        self.vocab_size = tokenizer.get_vocab_size()
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, with those that mark its beginning and end."""
        utf8(text)
        return self._tokenizer.encode(text).ids


def _library_file(name: str) -> Callable[..., LibraryTokenizer]:
    """Reads a tokenizer.json, which holds the vocabulary and all settings."""

    def load(path: Path) -> LibraryTokenizer:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        return LibraryTokenizer(name, tokenizer, sha256([path]))

    return load


def _wordpiece(vocab: Path) -> LibraryTokenizer:
    """BERT's: words and punctuation, each the longest pieces of the vocabulary from the left."""
    settings = _settings(vocab.parent, _WORDPIECE_SETTINGS)
    tokenizer = tokenizers.Tokenizer(models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=settings["do_lower_case"],
        handle_chinese_chars=settings["tokenize_chinese_chars"],
        strip_accents=settings["strip_accents"],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = _marks(tokenizer, vocab, "[CLS]", "[SEP]")
    digest = sha256([vocab], more=json.dumps(settings, sort_keys=True).encode())
    return LibraryTokenizer("wordpiece", tokenizer, digest)


def _bpe(vocab: Path, merges: Path) -> LibraryTokenizer:
    """CLIP's: lower case, split into words, numbers and signs, each merged from its bytes."""
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
    tokenizer.post_processor = _marks(tokenizer, vocab, start, end)
    return LibraryTokenizer("bpe", tokenizer, sha256([vocab, merges]))


def _marks(
    tokenizer: tokenizers.Tokenizer, vocab: Path, first: str, last: str
) -> processors.TemplateProcessing:
    """Puts a token before and one after each text."""
    ids = [(token, tokenizer.token_to_id(token)) for token in (first, last)]
    for token, token_id in ids:
        if token_id is None:
            raise UserError(f"{vocab}: token {token!r} is missing")
    return processors.TemplateProcessing(single=f"{first} $A {last}", special_tokens=ids)


# As in tokenizer_config.json, with the values of fields that are left out there.
_WORDPIECE_SETTINGS = {
    "do_lower_case": True,
    "tokenize_chinese_chars": True,
    "strip_accents": None,
}


def _settings(folder: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    path = folder / TOKENIZER_CONFIG_FILE
    found = read_json(path) if path.is_file() else {}
    return {name: found.get(name, default) for name, default in defaults.items()}


# By tokenizer_class: the files that a vocabulary may be in, the first that are there win.
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
    """The tokenizer in an encoder's folder; `kind` is a key of TOKENIZERS.

    Raises:
        UserError: another kind, or its files are missing or damaged.
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
            except Exception as e:  # the library's own errors have no narrower type
                raise UserError(f"{paths[0]}: not a vocabulary of {kind}: {first_line(e)}") from e
    expected = " or ".join(" + ".join(names) for names in TOKENIZERS[kind])
    raise UserError(f"text encoder {str(folder)!r}: no vocabulary; {kind} needs {expected}")
