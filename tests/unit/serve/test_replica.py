"""The decoding loop admits what it can hold, and tells its load whatever else it does."""

import asyncio
import pickle
import threading
import time

import pytest
from ray.serve.exceptions import BackPressureError

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.state import DecodeRequest
from workflows.serve.replica import DecodingLoop

REQUEST = DecodeRequest(prompt=(1,), config=DecodeConfig())


class StuckEngine:
    """An engine whose call does not return before `released`."""

    def __init__(self):
        self.released = threading.Event()
        self.num_active, self.num_waiting, self.cancelled = 0, 0, []

    def add(self, request):
        self.num_waiting += 1
        return self.num_waiting

    def cancel(self, row):
        self.cancelled.append(row)
        self.num_waiting -= 1

    def step(self):
        self.released.wait(10)
        time.sleep(0.001)
        return []


def test_a_row_too_many_is_refused_at_once_while_the_loop_is_busy_and_leaving_makes_room():
    async def scenario():
        engine = StuckEngine()
        loop = DecodingLoop(engine, max_waiting=2)
        rows = [asyncio.create_task(anext(loop.stream(REQUEST))) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert loop.load == {"running": 0, "waiting": 2}
        with pytest.raises(BackPressureError) as refused:
            await anext(loop.stream(REQUEST))
        assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
        for row in rows:
            row.cancel()
        engine.released.set()
        await asyncio.wait(rows)
        while loop.load["waiting"]:
            await asyncio.sleep(0.01)
        assert engine.cancelled == [1, 2]
        with pytest.raises(TimeoutError):  # admitted: it waits for its tokens
            await asyncio.wait_for(anext(loop.stream(REQUEST)), 0.1)

    asyncio.run(asyncio.wait_for(scenario(), 10))
