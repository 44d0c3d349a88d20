"""Text of an answer while it grows: a character may need several tokens, and a token's text may
depend on those before it."""

from __future__ import annotations

from ropool.engine.model import Tokenizer

_INCOMPLETE = "\ufffd"


class Detokenizer:
    """Turns tokens into pieces of text that add up to the text of the whole answer, special tokens
    left out.

    Only a short tail is decoded again for each token: the tokens since the last piece that had
    text, and those of that piece as their context.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tail: list[int] = []
        self._emitted = 0  # tokens of the tail whose text is out

    def push(self, token: int) -> str:
        """The text that became certain with `token`; empty while a character is incomplete."""
        self._tail.append(token)
        piece = self._pending()
        if piece.endswith(_INCOMPLETE):
            return ""
        if piece:  # a special token alone is no context: after it a word would begin the text
            self._tail = self._tail[self._emitted :]
        self._emitted = len(self._tail)
        return piece

    def flush(self) -> str:
        """The text held back, at the end of the answer."""
        piece = self._pending()
        self._emitted = len(self._tail)
        return piece

    def _pending(self) -> str:
        known = self._decode(self._tail[: self._emitted])
        return self._decode(self._tail)[len(known) :]

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
