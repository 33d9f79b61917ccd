"""Byte token ids are those of seqio.ByteVocabulary, without importing it."""

from __future__ import annotations

import pytest

from imagen_jax.errors import UserError
from imagen_jax.text.tokenizer import EOS_ID, ByteTokenizer

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
def test_ids_equal_seqio(text):
    seqio = pytest.importorskip("seqio")
    vocabulary = seqio.ByteVocabulary()
    assert ByteTokenizer().encode(text) == [*vocabulary.encode(text), vocabulary.eos_id]


def test_each_byte_is_a_token_and_the_end_is_marked():
    assert ByteTokenizer().encode("aé") == [ord("a") + 3, 0xC3 + 3, 0xA9 + 3, EOS_ID]


def test_half_a_surrogate_pair_is_refused():
    with pytest.raises(UserError, match=r"'\\ud83d' *: not valid Unicode"):
        ByteTokenizer().encode("\ud83d")
