"""Token ids as text, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers import decoders

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: How tokenizers decode bytes that are no character, or not yet one.
_UNKNOWN = "\ufffd"
#: A character has at most four bytes, so no more tokens than twice that can wait for its end.
_LONGEST_WAIT = 8
#: Tokens of no text (special ones) that are kept in view.
_KEPT = 64


class TextStream:
    """The text of ids that come one after the other, in pieces that joined are the text of all of them.

    A character of several tokens waits for its last one; special tokens are not shown. Only the ids since the piece
    before last are decoded again, since how a token is written can depend on the one before it, so that the work grows
    with the text and not with its square.

    Args:
        tokenizer: The model's.
        before: What stands before the first id, such as a prompt, where the text goes on after it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []
        self._before = list(before[-_LONGEST_WAIT:])
        self._shown = self._decode(self._before).rstrip(_UNKNOWN)

    def add(self, ids: Sequence[int]) -> str:
        """The text that some more ids add, as far as it is certain; may be empty."""
        self._waiting += ids
        for held in range(min(_LONGEST_WAIT, len(self._waiting))):
            ready = self._waiting[: len(self._waiting) - held]
            text = self._decode(self._before + ready)
            if not text.endswith(_UNKNOWN):
                return self._show(ready, text)
        return self.end() if len(self._waiting) > _LONGEST_WAIT else ""

    def end(self) -> str:
        """The rest, where no more ids come: half a character is told as U+FFFD."""
        return self._show(self._waiting, self._decode(self._before + self._waiting))

    def _show(self, ids: list[int], text: str) -> str:
        piece = text[len(self._shown) :]
        self._waiting = self._waiting[len(ids) :]
        self._before = ids if piece else (self._before + ids)[-_KEPT:]
        self._shown = self._decode(self._before)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True)) if ids else ""


class Spelling:
    """The bytes of text that each id stands for; a special token has those of its name.

    Args:
        tokenizer: One of the fast kind.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._backend = tokenizer.backend_tokenizer
        self._added = self._backend.get_added_tokens_decoder()
        byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)  # one letter of a token is one byte
        self._bytes = {letter: byte for byte, letter in bytes_to_unicode().items()} if byte_level else {}

    def __call__(self, id: int) -> bytes:
        """Those of one id; none for an id without a token, as models have that are wider than their tokenizer."""
        name: str = self._added[id].content if id in self._added else self._backend.id_to_token(id) or ""
        if id in self._added:
            return name.encode()
        if self._bytes.keys() >= set(name):
            return bytes(self._bytes[letter] for letter in name)
        if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
            return bytes([int(name[3:5], 16)])
        return name.replace("▁", " ").encode()
