"""Follow an answer as it grows: tokens, the text they are so far, and where it stops."""

import re
from collections.abc import Sequence
from copy import copy
from typing import Self

from lmsleep.text.tokenizers import Tokenizer

Piece = str | int

# What may still become a character: the first bytes of one, as tokenizers show them. UTF-8 has four at most,
# so three may be waiting for the last.
UNFINISHED = re.compile(r"(?:\\x[89a-f][0-9a-f]|\ufffd){1,3}$")


class Answer:
    """Collects tokens; text comes out in pieces that later tokens do not change.

    Args:
        tokenizer: makes the text, and has ends of a text; None: the answer stays tokens.
        stop: token numbers and, with a tokenizer, texts: the first that occurs, or the first end of a text,
            ends the answer, and is not part of it.

    Raises:
        ValueError: for a text among `stop` where there is no tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[Piece]) -> None:
        self.tokenizer, self.tokens, self.stopped = tokenizer, list[int](), False
        ends = () if tokenizer is None else tokenizer.ends
        self.stop_tokens = {*ends, *(s for s in stop if isinstance(s, int))}
        # Without the empty text, which occurs everywhere.
        self.stop_texts = [s for s in stop if isinstance(s, str) and s]
        if tokenizer is None and self.stop_texts:
            raise ValueError(f"stop={self.stop_texts[0]!r} is a text, and there is no tokenizer; give tokens")
        self._handed_out = 0

    def copy(self) -> Self:
        """Return the same answer so far; what is added to one is not in the other."""
        other = copy(self)
        other.tokens = list(self.tokens)  # the only part that is changed in place
        return other

    def add(self, token: int) -> None:
        """Add the next token, or stop at it."""
        if token in self.stop_tokens:
            self.stopped = True
            return
        self.tokens.append(token)
        if self.stop_texts:
            # All of the text, since a stop may begin in one token and end in another.
            self.stopped = any(s in self._decoded() for s in self.stop_texts)

    def whole(self) -> str | list[int]:
        """Return the answer so far: text, or tokens without a tokenizer."""
        return self.tokens if self.tokenizer is None else self._text()

    def pieces(self, *, last: bool) -> list[Piece]:
        """Return what is new and settled since the last call; all the rest if nothing follows."""
        begin = self._handed_out
        if self.tokenizer is None:
            self._handed_out = len(self.tokens)
            return list(self.tokens[begin:])
        text = self._text()
        # Never back behind what was handed out, though more of the end may be unsettled now.
        self._handed_out = max(begin, len(text) - (0 if last or self.stopped else self._unsettled(text)))
        piece = text[begin : self._handed_out]
        return [piece] if piece else []

    def _decoded(self) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(self.tokens)

    def _text(self) -> str:
        text = self._decoded()
        # Up to the earliest stop in the text, whichever of them it is.
        return text[: min((text.find(s) for s in self.stop_texts if s in text), default=len(text))]

    def _unsettled(self, text: str) -> int:
        """Count the characters at the end that may become another character, or part of a stop."""
        unfinished = UNFINISHED.search(text)
        # Beginnings of a stop that are not all of it: a whole one has ended the answer.
        begun = (k for s in self.stop_texts for k in range(1, len(s)) if text.endswith(s[:k]))
        return max(0 if unfinished is None else len(text) - unfinished.start(), max(begun, default=0))
