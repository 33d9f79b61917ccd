"""Text to token ids. Bytes need no vocabulary file, so they are what works out of the box."""

from __future__ import annotations

from imagen_jax.errors import UserError

PAD_ID = 0
EOS_ID = 1
_NUM_SPECIAL = 3  # pad, end of sequence, unknown


class ByteTokenizer:
    """UTF-8 bytes as tokens: the ids of seqio.ByteVocabulary and ByT5 (arXiv:2105.13626).

    Written out because importing seqio brings TensorFlow, which takes longer than encoding.
    """

    name = "bytes"

    def encode(self, text: str) -> list[int]:
        """The ids of `text` and the end-of-sequence id, which every T5 input carries.

        Raises:
            UserError: `text` holds half a surrogate pair, which has no UTF-8 form.
        """
        try:
            text_bytes = text.encode("utf-8")
        except UnicodeEncodeError as e:
            raise UserError(f"text {text!r}: not valid Unicode, {e.reason}") from e
        return [byte + _NUM_SPECIAL for byte in text_bytes] + [EOS_ID]
