"""Request: what one row of the engine is asked to fill, as token ids. Torch-free."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dllm_core.decoding.config import DecodeConfig
from dllm_core.errors import RequestError
from dllm_core.seeding import Bools, Ints


@dataclass(frozen=True)
class Request:
    """prompt + open positions + suffix. The open positions are `config.max_tokens`, or those of `middle`.

    middle: ids and, where None, open positions: any number of holes between given pieces; `max_tokens` says nothing
    then. An open end, behind which nothing is given, ends at its first end token; a hole before something given is
    filled whole, without one.

    strength: `middle` holds ids alone, and decoding begins from them as the model's noise leaves them at t = strength:
    masked positions, or all of them where the noise replaces tokens, are decoded from there to t = 0. SDEdit's idea,
    arXiv:2108.01073. At least one position is changed. spans: (begin, stop) of what in `middle` is noised; () for all.

    stop: strings of which the first in the answer ends it, and is cut off.

    constraint: a regular expression that all of the answer's text matches (`schema.schema_regex` makes one of a JSON
    schema).

    top_logprobs: how many of the likeliest tokens a call tells at each position that it commits.
    """

    prompt: tuple[int, ...]
    config: DecodeConfig
    suffix: tuple[int, ...] = ()
    seed: int = 0
    middle: tuple[int | None, ...] | None = None
    strength: float | None = None
    stop: tuple[str, ...] = ()
    constraint: str | None = None
    top_logprobs: int = 0
    spans: tuple[tuple[int, int], ...] = ()

    @property
    def region_length(self) -> int:
        """Positions between prompt and suffix."""
        return self.config.max_tokens if self.middle is None else len(self.middle)

    @property
    def length(self) -> int:
        """Positions of the row."""
        return len(self.prompt) + self.region_length + len(self.suffix)

    @property
    def is_ended_by_model(self) -> bool:
        """Whether nothing is given behind the last open position, so that an end token may stand there."""
        return not self.suffix and (self.middle is None or self.middle[-1] is None)

    @property
    def reads_behind_holes(self) -> bool:
        """Whether something is given behind an open position."""
        return bool(self.suffix) or (self.middle is not None and any(token is not None for token in self.middle))

    @property
    def open_end(self) -> int:
        """Where the open end begins: an end token may stand from there on. The row's length if there is none."""
        if not self.is_ended_by_model:
            return self.length
        given = [i for i, token in enumerate(self.middle or ()) if token is not None]
        return len(self.prompt) + (given[-1] + 1 if given else 0)

    @property
    def region(self) -> Ints:
        """What is given between prompt and suffix [region_length], -1 where nothing is."""
        middle = (None,) * self.config.max_tokens if self.middle is None else self.middle
        return np.array([-1 if token is None else token for token in middle], np.int64)

    @property
    def num_given(self) -> int:
        """Tokens that the request holds."""
        return len(self.prompt) + len(self.suffix) + sum(token is not None for token in self.middle or ())

    @property
    def num_asked(self) -> int:
        """Positions that it asks to be filled, at most."""
        if self.strength is not None:
            return int(self.is_edited.sum())
        return self.region_length - sum(token is not None for token in self.middle or ())

    @property
    def is_edited(self) -> Bools:
        """What of the region `strength` makes anew [region_length]."""
        edited = np.full(self.region_length, not self.spans)
        for begin, stop in self.spans:
            edited[begin:stop] = True
        return edited

    def check(self, vocab_size: int, context_length: int) -> None:
        """Refuse what cannot be decoded: too long, ids outside the vocabulary, nothing to fill."""
        if self.length > context_length:
            asked = f"max_tokens ({self.region_length})" if self.middle is None else f"middle ({self.region_length})"
            problem = (
                f"prompt ({len(self.prompt)}) + {asked} + suffix "
                f"({len(self.suffix)}) exceed the context of {context_length} tokens"
            )
            raise RequestError("max_tokens", problem, remedy="shorten the prompt or ask for fewer tokens")
        for place, ids in (("prompt", self.prompt), ("suffix", self.suffix), ("middle", self.middle or ())):
            if any(i is not None and not 0 <= i < vocab_size for i in ids):
                raise RequestError(place, f"token ids must be in [0, {vocab_size})")
        if self.strength is not None and not 0 < self.strength <= 1:
            raise RequestError("strength", "must be in (0, 1]", self.strength)
        is_open = [token is None for token in ((None,) if self.middle is None else self.middle)]
        if self.strength is None and not any(is_open):
            raise RequestError("middle", "has no open position: there is nothing to fill")
        if self.strength is not None and (not self.middle or any(is_open)):
            raise RequestError("middle", "must be whole where strength says how much of it is made anew")
        if any(not 0 <= begin < stop <= self.region_length for begin, stop in self.spans):
            problem = f"must be (begin, stop) within the {self.region_length} tokens of middle"
            raise RequestError("spans", problem, [list(span) for span in self.spans])
        if self.spans and self.strength is None:
            raise RequestError("spans", "say what is made anew, and strength does not say how much of it")

    def shortened(self, room: int) -> "Request":
        """The same with at most so many open positions at its end."""
        config = self.config.model_copy(update={"max_tokens": min(self.config.max_tokens, room)})
        return replace(self, config=config)


@dataclass(frozen=True)
class OpenHole:
    """A hole of `least` to `most` positions; of one length where they are equal."""

    least: int
    most: int


Piece = tuple[int, ...] | OpenHole


def with_holes(request: Request, pieces: Sequence[Piece], lengths: Sequence[int] | None = None) -> Request:
    """The request with `pieces` as its middle, its holes of these lengths, by default their least."""
    left = iter(lengths or [piece.least for piece in pieces if isinstance(piece, OpenHole)])
    middle: list[int | None] = []
    for piece in pieces:
        middle.extend([None] * next(left) if isinstance(piece, OpenHole) else piece)
    return replace(request, middle=tuple(middle))


def holes_of(request: Request, tokens: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
    """What an answer has put into each hole of `middle`, in order; one behind its end is empty.

    lengths: the holes', by which neighbours are told apart.
    """
    made = iter([token for token, given in zip(tokens, request.middle or (), strict=False) if given is None])
    return [list(itertools.islice(made, length)) for length in lengths]


def runs(middle: Sequence[int | None], tokens: Sequence[int]) -> list[tuple[list[int], bool]]:
    """The answer's tokens in runs of those that were given and those that were made (True)."""
    found: list[tuple[list[int], bool]] = []
    for i, given in enumerate(middle):
        is_made = given is None
        if not found or found[-1][1] != is_made:
            found.append(([], is_made))
        if i < len(tokens):
            found[-1][0].append(tokens[i])
    return found
