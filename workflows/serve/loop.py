"""DecodingLoop: one engine, one thread, many requests at once. Token ids in, token ids out.

The loop is supervised: if it dies or hangs, `check` fails, and whoever waits is told instead of waiting for ever. Rows
that were in it when it died are not tried elsewhere, since one of them may be why.
Admission is its own: rows too many are refused with BackPressureError, all that were asked for together.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray.serve.exceptions import BackPressureError

from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import RequestError
from workflows.serve.progress import Call, Detail, LoopEndedError, Progress, Reader, Told
from workflows.serve.work import Fullness, predicted_work

_HUNG_AFTER_S = 60.0
_STANDS_STILL_AFTER_S = 5.0  # others are asked first then; a call may well take longer, and nothing is ended yet


class DecodingLoop:
    """Runs an engine in a thread while requests come and go.

    The thread ticks for as long as nobody is to hear of it; between its runs, and then only, the event loop adds rows
    and lets them go.
    """

    def __init__(self, engine: Engine, max_waiting: int) -> None:
        self._engine, self._max_waiting = engine, max_waiting
        self._rows: dict[int, Reader] = {}
        self._wanted: list[Call] = []
        self._left: list[Call] = []
        self._wake = asyncio.Event()
        self._tick_began: float | None = None
        self._fullness, self._asked_at = Fullness(), time.monotonic()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stream(
        self, requests: Sequence[Request], detail: Detail = "tokens", end_id: int | None = None
    ) -> AsyncGenerator[Told, None]:
        """Progress of these rows as `detail` says, and each one's end. Leaving early frees all of them.

        A row that cannot be decoded is told of by its error, and the others go on. Raises BackPressureError if
        `max_waiting` rows would wait; where none waits, any number is let in. Raises as `check` does.
        """
        self.check()
        waiting = self.load["waiting"]
        if waiting and waiting + len(requests) > self._max_waiting:
            raise BackPressureError(num_queued_requests=waiting, max_queued_requests=self._max_waiting)
        call, still_open = Call(requests, end_id, detail), len(requests)
        self._wanted.append(call)
        self._wake.set()
        try:
            while still_open:
                told = await call.inbox.get()
                if isinstance(told, Exception):
                    raise told
                still_open -= sum(not isinstance(one, Progress) or one.finish_reason is not None for _, one in told)
                yield told
        finally:
            if call in self._wanted:
                self._wanted.remove(call)
            else:
                self._left.append(call)
            self._wake.set()

    def check(self) -> None:
        """Raise LoopEndedError if requests would wait for ever."""
        if self._task.done():
            error = None if self._task.cancelled() else self._task.exception()
            raise LoopEndedError(f"the decoding loop has ended: {error!r}")
        if self._in_call_s > _HUNG_AFTER_S:
            raise LoopEndedError("the decoding loop hangs in a denoiser call")

    @property
    def stands_still(self) -> bool:
        """Whether a denoiser call takes so long that whoever can be sent elsewhere should be."""
        return self._in_call_s > _STANDS_STILL_AFTER_S

    @property
    def _in_call_s(self) -> float:
        """Since when the thread is in the tick that it is in; 0 between two."""
        began = self._tick_began
        return 0.0 if began is None else time.monotonic() - began

    async def close(self) -> None:
        """End the loop; whoever waits is told, leaves, and so ends the ticks."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._thread.shutdown(wait=False)

    @property
    def load(self) -> dict[str, int]:
        """Rows in the batch and waiting."""
        wanted = sum(len(call.readers) for call in self._wanted)
        return {"running": self._engine.num_active, "waiting": self._engine.num_waiting + wanted}

    @property
    def work(self) -> int:
        """Denoiser calls that the rows here are still expected to take, summed over rows."""
        kind = self._engine.is_ancestral
        begun = sum(max(1, predicted_work(one.request, kind) - one.num_calls) for one in self._rows.values())
        return begun + sum(predicted_work(one.request, kind) for call in self._wanted for one in call.readers)

    def busy_share(self) -> float:
        """The share of what the engine could have done since this was last asked that it has done: `work.Fullness`."""
        now = time.monotonic()
        since, self._asked_at = max(now - self._asked_at, 1e-6), now
        return min(1.0, self._fullness.taken_s() / since)

    async def _run(self) -> None:
        here = asyncio.get_running_loop()
        try:
            while True:
                self._exchange()
                if not self._rows:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                calls, ended = await here.run_in_executor(self._thread, self._ticks)
                for row in ended:
                    del self._rows[row]
                for call in calls:
                    call.tell(self._engine.eos_id)
        except BaseException as error:
            failure = RuntimeError(f"decoding failed: {error!r}")
            for call in {reader.call for reader in self._rows.values()} | {*self._wanted}:
                call.inbox.put_nowait(failure)
            raise

    def _exchange(self) -> None:
        """Between ticks: take new rows in, let go those that were left."""
        while self._wanted:  # where all wait until they are added: who fails to add one can tell them
            call = self._wanted[0]
            for reader in call.readers:
                try:
                    row = self._engine.add(reader.request)
                except RequestError as error:
                    reader.fail(error)
                    continue
                self._rows[row] = reader
                call.rows.append(row)
            del self._wanted[0]
            call.tell(self._engine.eos_id)
        left, self._left = self._left, []
        for row in [row for call in left for row in call.rows if row in self._rows]:
            self._engine.cancel(row)
            del self._rows[row]

    def _ticks(self) -> tuple[list[Call], list[int]]:
        """In the thread: ticks until someone is to be told of them, or has come or left. Whom, and the rows that ended.

        Back and forth between thread and event loop is 0.3 ms, an eighth of a small model's tick.
        """
        moved: dict[Call, None] = {}
        while True:
            self._tick_began = began = time.monotonic()
            updates = self._engine.step()
            self._fullness.tick(len(updates), time.monotonic() - began, self._engine.fill)
            self._tick_began = None
            readers = [(one.row, self._rows[one.row]) for one in updates]
            for update, (row, reader) in zip(updates, readers, strict=True):
                reader.note(update, self._engine.eos_id, began)
                moved[reader.call] = None
                if reader.is_ended:
                    self._engine.cancel(row)  # no error where it has ended itself
            due = [call for call in moved if call.is_due]
            if due or self._wanted or self._left or not updates:
                return due, [row for row, reader in readers if reader.is_ended]
