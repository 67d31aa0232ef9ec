"""TextStream: committed tokens in, text out that is never taken back. Pure; no HTTP, no Ray.

Held back: the bytes of an unfinished code point, and an end that might grow into a stop string.
"""

from collections.abc import Sequence
from typing import Protocol

_UNFINISHED = "\ufffd"
_LONGEST_CODE_POINT = 4


class Decodes(Protocol):
    """What is needed of a tokenizer."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


class TextStream:
    """The text of one choice while its tokens arrive."""

    def __init__(self, tokenizer: Decodes, stops: Sequence[str] = ()) -> None:
        self._tokenizer, self._stops = tokenizer, tuple(stops)
        self._sent = ""
        self.stopped = False

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The new text, given *all* of the answer's tokens so far; `last`: no more will come."""
        if self.stopped:
            return ""
        text = self._tokenizer.decode(tokens)
        if not last:
            text = _without_unfinished(text)
        settled = len(text) if last else self._settled(text)
        cut = min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        self.stopped = cut is not None and cut <= settled  # else a longer stop string may have begun before this one
        text = text[: cut if self.stopped else settled]
        new = text[len(self._sent) :]
        self._sent += new
        return new

    @property
    def text(self) -> str:
        """All text so far."""
        return self._sent

    def _settled(self, text: str) -> int:
        """Characters that no stop string can begin in, whatever follows."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for start in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stops):
                return start
        return len(text)


def _without_unfinished(text: str) -> str:
    """Without the U+FFFD at the end that a code point's first bytes show as; one further back is there to stay."""
    tail = text[-_LONGEST_CODE_POINT:]
    return text[: len(text) - (len(tail) - len(tail.rstrip(_UNFINISHED)))]
