"""DecodingLoop: one engine, one thread, many requests at once. Token ids in, token ids out.

The loop is supervised: if it dies or hangs, `check` fails, and whoever waits is told instead of waiting for ever.
Admission is its own: a row too many is refused with BackPressureError.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from ray.serve.exceptions import BackPressureError

from dllm_core.decoding.engine import Engine, RowUpdate
from dllm_core.decoding.request import Request
from dllm_core.decoding.state import DecodeState, FinishReason
from dllm_core.errors import DllmError, RequestError
from workflows.serve.work import predicted_work

_HUNG_AFTER_S = 60.0
# A message costs about a millisecond of CPU in each of two processes: what calls add so soon goes with the next one.
_TELL_EVERY_S = 0.04
OPEN = -1

# end: the last alone; tokens: when there are new ones, not more often than people see; commits: those, and what each
# call was sure of; canvas: after every call, with what stands everywhere.
Detail = Literal["end", "tokens", "commits", "canvas"]


@dataclass(frozen=True)
class Commit:
    """A token that became final. position: from the first behind the prompt; log_prob: nats, of the call that did it.

    best: the likeliest tokens there in that call and their log-probabilities, as many as were asked for.
    """

    position: int
    token: int
    log_prob: float
    best: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Progress:
    """A row after a call: all answer tokens so far, in order, none of which will change.

    commits: since what was told before; canvas: what stands between prompt and suffix, OPEN where nothing does yet.
    waited_s: from when the row was asked for to its first call.
    """

    tokens: list[int]
    num_calls: int
    num_committed: int
    finish_reason: FinishReason | None
    commits: tuple[Commit, ...] = ()
    canvas: list[int] | None = None
    waited_s: float = 0.0


@dataclass
class _Reader:
    """Who follows a row, and what it has taken."""

    request: Request
    detail: Detail
    num_calls: int = 0
    inbox: asyncio.Queue[Progress | Exception] = field(default_factory=asyncio.Queue)
    told: int = -1
    told_at: float = -math.inf
    commits: list[Commit] = field(default_factory=list)
    asked_at: float = field(default_factory=time.monotonic)
    waited_s: float | None = None

    def take(self, update: RowUpdate, eos_id: int, tick_began: float) -> None:
        """Tell of it what is asked for."""
        state = update.state
        self.num_calls = state.num_calls
        if self.waited_s is None:
            self.waited_s = tick_began - self.asked_at
        is_end = state.finish_reason is not None
        if state.finish_reason == "error":
            self.inbox.put_nowait(DllmError("model", "its output for this request is no number"))
            return
        if self.detail in ("commits", "canvas"):
            self.commits += _commits(update)
        if self.detail == "end" and not is_end:
            return
        tokens = state.answer(eos_id)
        if not is_end and self.detail != "canvas" and len(tokens) <= self.told:
            return
        now = time.monotonic()
        if not is_end and self.detail != "canvas" and now - self.told_at < _TELL_EVERY_S:
            return
        self.told, self.told_at = len(tokens), now
        commits, self.commits = tuple(self.commits), []
        canvas = _canvas(state) if self.detail == "canvas" else None
        told = (tokens, state.num_calls, state.num_committed, state.finish_reason)
        self.inbox.put_nowait(Progress(*told, commits, canvas, self.waited_s))


def _commits(update: RowUpdate) -> list[Commit]:
    head = len(update.state.request.prompt)
    logs = np.log(np.maximum(update.confidence, np.finfo(np.float32).tiny)).tolist()
    best = [
        tuple(zip(tokens, log_probs, strict=True))
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


class DecodingLoop:
    """Runs an engine in a thread while requests come and go; the engine is touched between ticks only."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine, self._max_waiting = engine, max_waiting
        self._rows: dict[int, _Reader] = {}
        self._wanted: list[tuple[_Reader, asyncio.Future[int]]] = []
        self._dropped: list[int] = []
        self._wake = asyncio.Event()
        self._tick_began: float | None = None
        self._busy_s, self._asked_at = 0.0, time.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stream(self, request: Request, detail: Detail = "tokens") -> AsyncIterator[Progress]:
        """Progress as `detail` says, and at the row's end. Leaving early frees the row.

        Raises BackPressureError if `max_waiting` rows wait already.
        """
        self.check()
        waiting = self.load["waiting"]
        if waiting >= self._max_waiting:
            raise BackPressureError(num_queued_requests=waiting, max_queued_requests=self._max_waiting)
        reader = _Reader(request, detail)
        admitted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._wanted.append((reader, admitted))
        self._wake.set()
        try:
            await admitted
            while True:
                item = await reader.inbox.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish_reason is not None:
                    return
        finally:
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
                self._dropped.append(admitted.result())
            else:
                self._wanted = [item for item in self._wanted if item[1] is not admitted]
            self._wake.set()

    def check(self) -> None:
        """Raise if requests would wait for ever."""
        if self._task.done():
            error = None if self._task.cancelled() else self._task.exception()
            raise RuntimeError(f"the decoding loop has ended: {error!r}")
        if self._tick_began is not None and time.monotonic() - self._tick_began > _HUNG_AFTER_S:
            raise RuntimeError("the decoding loop hangs in a denoiser call")

    async def close(self) -> None:
        """End the loop; whoever waits is told."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False)

    @property
    def load(self) -> dict[str, int]:
        """Rows in the batch and waiting."""
        return {
            "running": self._engine.num_active,
            "waiting": self._engine.num_waiting + len(self._wanted),
        }

    @property
    def work(self) -> int:
        """Denoiser calls that the rows here are still expected to take, summed over rows."""
        kind = self._engine.is_ancestral
        begun = sum(max(1, predicted_work(one.request, kind) - one.num_calls) for one in self._rows.values())
        return begun + sum(predicted_work(reader.request, kind) for reader, _ in self._wanted)

    def busy_share(self) -> float:
        """The share of the time since this was last asked that the engine was at work."""
        now = time.monotonic()
        busy, self._busy_s = self._busy_s, 0.0
        since, self._asked_at = max(now - self._asked_at, 1e-6), now
        return min(1.0, busy / since)

    async def _run(self) -> None:
        try:
            while True:
                self._exchange()
                if not self._rows:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                self._tick_began = time.monotonic()
                step = asyncio.get_running_loop().run_in_executor(self._thread, self._engine.step)
                for update in await step:
                    self._tell(update, self._tick_began)
                self._busy_s += time.monotonic() - self._tick_began
                self._tick_began = None
        except BaseException as error:
            failure = RuntimeError(f"decoding failed: {error!r}")
            for reader in self._rows.values():
                reader.inbox.put_nowait(failure)
            for _, admitted in self._wanted:
                if not admitted.done():
                    admitted.set_exception(failure)
            raise

    def _exchange(self) -> None:
        """Between ticks: take new rows in, let cancelled ones go."""
        wanted, self._wanted = self._wanted, []
        for reader, admitted in wanted:
            if admitted.done():
                continue
            try:
                row = self._engine.add(reader.request)
            except RequestError as error:
                admitted.set_exception(error)
                continue
            self._rows[row] = reader
            admitted.set_result(row)
        dropped, self._dropped = self._dropped, []
        for row in dropped:
            self._engine.cancel(row)
            self._rows.pop(row, None)

    def _tell(self, update: RowUpdate, tick_began: float) -> None:
        reader = self._rows.get(update.row)
        if reader is None:
            return
        reader.take(update, self._engine.eos_id, tick_began)
        if update.state.finish_reason is not None:
            del self._rows[update.row]
