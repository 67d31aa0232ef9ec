"""Progress: what is told of rows while they are decoded, and how often. The rows of a call share its messages.

A message costs about a millisecond of CPU in each of two processes, whatever it holds. So a tick makes one message of
a call at most, for all of its rows, and one that has no more than new tokens waits for the next.
"""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from dllm_core.decoding.request import Request
from dllm_core.decoding.state import DecodeState, FinishReason
from dllm_core.errors import DllmError

if TYPE_CHECKING:  # a gateway, which reads what is told, needs no torch
    from dllm_core.decoding.answer import RowUpdate

_TELL_EVERY_S = 0.04  # new tokens alone are not told more often than people see
OPEN = -1


class ElsewhereError(RuntimeError):
    """Nothing of a call was begun: it may go to another replica."""


class LoopEndedError(ElsewhereError):
    """A replica decodes no more."""


class NotLoadedError(ElsewhereError):
    """A replica has not yet, or no longer, the bundle that a gateway knows by this name."""

    def __str__(self) -> str:
        return f"the model {self.args[0]!r} is not loaded: it is on its way, or its bundle has changed"


# end: the last alone; tokens: when there are new ones; commits: those, and what each call was sure of; canvas: after
# every call, with what stands everywhere.
Detail = Literal["end", "tokens", "commits", "canvas"]


@dataclass(frozen=True)
class Commit:
    """A token that became final. position: from the first behind the prompt; log_prob: nats, of the call that did it.

    best: the likeliest tokens there in that call and their log-probabilities, as many as were asked for and possible.
    """

    position: int
    token: int
    log_prob: float
    best: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """A row after a call: all answer tokens so far, in order, none of which will change.

    commits: since what was told before; canvas: what stands between prompt and suffix, OPEN where nothing does yet.
    waited_s: from when the row was asked for to its first call; first_ago_s: since its first committed token, when this
    was told.
    """

    tokens: list[int]
    num_calls: int
    num_committed: int
    finish_reason: FinishReason | None
    commits: tuple[Commit, ...] = ()
    canvas: list[int] | None = None
    waited_s: float = 0.0
    first_ago_s: float = 0.0


# One message: of some of a call's rows, by their place in it, how far they are, or why they have failed.
Told = list[tuple[int, Progress | Exception]]


class Reader:
    """A row of a call: what has become of it, and what of that was told."""

    def __init__(self, index: int, request: Request, call: "Call") -> None:
        self.index, self.request, self.call = index, request, call
        self.num_calls = 0
        self.is_ended = self.is_ended_early = False
        self._state: DecodeState | None = None
        self._failure: Exception | None = None
        self._commits: list[Commit] = []
        self._told = -1
        self._is_new = False
        self._asked_at, self._waited_s = time.monotonic(), math.nan
        self._first_at: float | None = None

    def fail(self, error: Exception) -> None:
        """It ends with this."""
        self._failure, self.is_ended = error, True

    def note(self, update: "RowUpdate", eos_id: int, tick_began: float) -> None:
        """What a tick did to it."""
        state = self._state = update.state
        self._is_new = True
        if not self.num_calls:
            self._waited_s = tick_began - self._asked_at
        self.num_calls = state.num_calls
        if state.finish_reason == "error":
            self.fail(DllmError("model", "its output for this request is no number"))
            return
        if self._first_at is None and state.num_committed:
            self._first_at = time.monotonic()
        if self.call.detail in ("commits", "canvas"):
            self._commits += _commits(update)
        self.is_ended = state.finish_reason is not None
        end_id = self.call.end_id
        if end_id is not None and not self.is_ended:
            made = slice(len(self.request.prompt), state.answer_stop)
            if (state.canvas[made] == end_id).any():
                self.is_ended = self.is_ended_early = end_id in state.answer(eos_id)

    def news(self, eos_id: int) -> Progress | Exception | None:
        """What was not told yet; None where that is nothing."""
        state, detail = self._state, self.call.detail
        if self._failure is not None:
            return self._failure
        if state is None or not self._is_new or (detail == "end" and not self.is_ended):
            return None
        tokens = state.answer(eos_id)
        if not self.is_ended and detail != "canvas" and len(tokens) <= self._told:
            return None
        self._told, self._is_new = len(tokens), False
        commits, self._commits = tuple(self._commits), []
        canvas = _canvas(state) if detail == "canvas" else None
        finish_reason = "stop" if self.is_ended_early else state.finish_reason
        told = (tokens, state.num_calls, state.num_committed, finish_reason)
        first_ago_s = 0.0 if self._first_at is None else time.monotonic() - self._first_at
        return Progress(*told, commits, canvas, self._waited_s, first_ago_s)


class Call:
    """Rows that were asked for together, and who follows them.

    end_id: a token that ends an answer beside the model's own, where it stands in what will not change.
    """

    def __init__(self, requests: Sequence[Request], end_id: int | None, detail: Detail) -> None:
        self.end_id, self.detail = end_id, detail
        self.readers = [Reader(index, request, self) for index, request in enumerate(requests)]
        self.rows: list[int] = []  # the engine's names of them
        self.inbox: asyncio.Queue[Told | Exception] = asyncio.Queue()
        self._open = list(self.readers)
        self._told_at = -math.inf

    @property
    def is_due(self) -> bool:
        """Whether what ticks did to its rows is to be told now."""
        if any(reader.is_ended for reader in self._open):
            return True
        if self.detail in ("end", "canvas"):
            return self.detail == "canvas"
        return time.monotonic() - self._told_at >= _TELL_EVERY_S

    def tell(self, eos_id: int) -> None:
        """Put what was not told yet into one message."""
        told = [(reader.index, news) for reader in self._open if (news := reader.news(eos_id)) is not None]
        if not told:
            return
        self._told_at = time.monotonic()
        self._open = [reader for reader in self._open if not reader.is_ended]
        self.inbox.put_nowait(told)


def _commits(update: "RowUpdate") -> list[Commit]:
    head = len(update.state.request.prompt)
    logs = np.log(np.maximum(update.confidence, np.finfo(np.float32).tiny)).tolist()
    best = [  # what a call gives no probability at all is no alternative, and its logarithm no JSON
        tuple(pair for pair in zip(tokens, log_probs, strict=True) if pair[1] > -math.inf)
        for tokens, log_probs in zip(update.best_tokens.tolist(), update.best_log_probs.tolist(), strict=True)
    ]
    made = zip(update.commits, logs, best, strict=True)
    return [Commit(position - head, token, log_prob, top) for (position, token, _), log_prob, top in made]


def _canvas(state: DecodeState) -> list[int]:
    """Up to where it was closed behind an end token."""
    head, stop = len(state.request.prompt), state.answer_stop
    closed = np.flatnonzero(state.is_closed[head:stop])
    stop = head + int(closed[0]) if len(closed) else stop
    held = state.canvas[head:stop]
    is_open = (held == state.mask_id) & ~state.is_final[head:stop]
    return [int(token) for token in np.where(is_open, OPEN, held)]
