"""DecodeReplica: one engine, one decoding loop, many requests at once. Token ids in, token ids out.

The loop is supervised: if it dies or hangs, the health check fails, Ray replaces the replica, and whoever waits is
told instead of waiting for ever. Admission is the loop's own: a row too many is refused with BackPressureError, while
Ray Serve lets every call in, so that a question after the load never waits behind work.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from ray.serve.exceptions import BackPressureError

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.engine import Engine, RowUpdate
from dllm_core.decoding.request import Request
from dllm_core.decoding.state import FinishReason
from dllm_core.errors import DllmError, RequestError

_HUNG_AFTER_S = 60.0


@dataclass(frozen=True)
class Progress:
    """A row after a call: all answer tokens so far, in order, none of which will change."""

    tokens: list[int]
    num_calls: int
    num_committed: int
    finish_reason: FinishReason | None


class DecodingLoop:
    """Runs an engine in a thread while requests come and go; the engine is touched between ticks only."""

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine, self._max_waiting = engine, max_waiting
        self._rows: dict[int, asyncio.Queue[Progress | Exception]] = {}
        self._wanted: list[tuple[Request, asyncio.Queue[Progress | Exception], asyncio.Future[int]]] = []
        self._dropped: list[int] = []
        self._wake = asyncio.Event()
        self._tick_began: float | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stream(self, request: Request) -> AsyncIterator[Progress]:
        """Progress after each call that gave the row new answer tokens, and at its end. Leaving early frees the row.

        Raises BackPressureError if `max_waiting` rows wait already.
        """
        self.check()
        waiting = self.load["waiting"]
        if waiting >= self._max_waiting:
            raise BackPressureError(num_queued_requests=waiting, max_queued_requests=self._max_waiting)
        inbox: asyncio.Queue[Progress | Exception] = asyncio.Queue()
        admitted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._wanted.append((request, inbox, admitted))
        self._wake.set()
        try:
            await admitted
            told = -1
            while True:
                item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason is not None or len(item.tokens) > told:
                    told = len(item.tokens)
                    yield item
                if item.finish_reason is not None:
                    return
        finally:
            if admitted.done() and not admitted.cancelled() and admitted.exception() is None:
                self._dropped.append(admitted.result())
            else:
                self._wanted = [item for item in self._wanted if item[2] is not admitted]
            self._wake.set()

    def check(self) -> None:
        """Raise if requests would wait for ever."""
        if self._task.done():
            error = None if self._task.cancelled() else self._task.exception()
            raise RuntimeError(f"the decoding loop has ended: {error!r}")
        if self._tick_began is not None and time.monotonic() - self._tick_began > _HUNG_AFTER_S:
            raise RuntimeError("the decoding loop hangs in a denoiser call")

    @property
    def load(self) -> dict[str, int]:
        """Rows in the batch and waiting."""
        return {
            "running": self._engine.num_active,
            "waiting": self._engine.num_waiting + len(self._wanted),
        }

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
                    self._tell(update)
                self._tick_began = None
        except BaseException as error:
            failure = RuntimeError(f"decoding failed: {error!r}")
            for inbox in self._rows.values():
                inbox.put_nowait(failure)
            for _, _, admitted in self._wanted:
                if not admitted.done():
                    admitted.set_exception(failure)
            raise

    def _exchange(self) -> None:
        """Between ticks: take new rows in, let cancelled ones go."""
        wanted, self._wanted = self._wanted, []
        for request, inbox, admitted in wanted:
            if admitted.done():
                continue
            try:
                row = self._engine.add(request)
            except RequestError as error:
                admitted.set_exception(error)
                continue
            self._rows[row] = inbox
            admitted.set_result(row)
        dropped, self._dropped = self._dropped, []
        for row in dropped:
            self._engine.cancel(row)
            self._rows.pop(row, None)

    def _tell(self, update: RowUpdate) -> None:
        inbox = self._rows.get(update.row)
        if inbox is None:
            return
        state = update.state
        if state.finish_reason == "error":
            inbox.put_nowait(DllmError("model", "its output for this request is no number"))
        else:
            inbox.put_nowait(
                Progress(
                    tokens=state.answer(self._engine.eos_id),
                    num_calls=state.num_calls,
                    num_committed=state.num_committed,
                    finish_reason=state.finish_reason,
                )
            )
        if state.finish_reason is not None:
            del self._rows[update.row]


class DecodeReplica:
    """The Ray Serve deployment around a DecodingLoop."""

    def __init__(
        self, run_url: str, dtype: str | None, max_batch_tokens: int, max_waiting: int, threads: int, use_gpu: bool
    ) -> None:
        import torch

        torch.set_num_threads(threads)
        bundle = read_bundle(RunDir.at(run_url))
        self._engine = Engine(bundle, "cuda" if use_gpu else "cpu", max_batch_tokens, dtype=dtype)
        self._max_waiting = max_waiting
        self._loop: DecodingLoop | None = None

    def _decoding(self) -> DecodingLoop:
        if self._loop is None:  # the constructor has no running event loop
            self._loop = DecodingLoop(self._engine, self._max_waiting)
        return self._loop

    async def generate(self, request: Request) -> Progress:
        """Decode one row to its end."""
        last: Progress | None = None
        async for progress in self._decoding().stream(request):
            last = progress
        assert last is not None
        return last

    async def stream(self, request: Request) -> AsyncIterator[Progress]:
        """Decode one row, telling its progress."""
        async for progress in self._decoding().stream(request):
            yield progress

    async def load(self) -> dict[str, Any]:
        """Rows running and waiting; raises if the loop is dead."""
        loop = self._decoding()
        loop.check()
        return loop.load

    async def check_health(self) -> None:
        """Called by Ray Serve."""
        if self._loop is not None:
            self._loop.check()
