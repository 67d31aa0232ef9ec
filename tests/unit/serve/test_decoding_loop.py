"""The decoding loop admits what it can hold, and tells its load whatever else it does."""

import asyncio
import pickle
import threading
import time
from dataclasses import replace

import pytest
import torch
from ray.serve.exceptions import BackPressureError

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.errors import DllmError, RequestError
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig
from workflows.serve.loop import DecodingLoop

EVERY_DECODER = pytest.mark.parametrize(
    "said",
    [{}, {"objective": AutoregressiveConfig()}, {"objective": BlockDiffusionConfig(), "block_length": 4}],
    ids=["whole", "autoregressive", "blocks"],
)
REQUEST = Request(prompt=(1,), config=DecodeConfig())


class StuckEngine:
    """An engine whose call does not return before `released`."""

    def __init__(self):
        self.released = threading.Event()
        self.num_active, self.num_waiting, self.cancelled, self.is_ancestral = 0, 0, [], False

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


@EVERY_DECODER
def test_rows_that_share_the_loop_are_told_what_each_engine_answers_alone(small_bundle, said):
    bundle = read_bundle(small_bundle)
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update=said))
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=9, temperature=1)
    requests = [Request(prompt=(7, 8, 9)[:n], config=config, seed=n) for n in range(4)]

    async def scenario():
        loop = DecodingLoop(Engine(bundle), max_waiting=8)

        async def last(request):
            told = [progress async for progress in loop.stream(request)]
            assert all(progress.tokens == told[-1].tokens[: len(progress.tokens)] for progress in told)
            return told[-1]

        return await asyncio.gather(*map(last, requests))

    told = asyncio.run(asyncio.wait_for(scenario(), 30))
    for progress, request in zip(told, requests, strict=True):
        [answer] = Engine(bundle).generate([request])
        assert (progress.tokens, progress.num_calls) == (answer.tokens, answer.num_calls)
        assert (progress.num_committed, progress.finish_reason) == (answer.num_committed, answer.finish_reason)


def test_a_row_whose_output_is_no_number_is_told_so_and_its_neighbours_are_not(small_bundle):
    engine = Engine(read_bundle(small_bundle))
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=8)
    good, bad = Request((7, 8), config), Request((9, 8), config)
    alone = Engine(read_bundle(small_bundle)).generate([good])[0]
    engine.denoiser.embed.register_forward_hook(  # what token 9 looks up went bad
        lambda _, ids, found: found.masked_fill((ids[0] == 9)[..., None], torch.nan)
    )

    async def scenario():
        loop = DecodingLoop(engine, max_waiting=8)
        told = await asyncio.gather(
            *(anext(loop.stream(request)) for request in (bad, good)),
            return_exceptions=True,
        )
        assert not isinstance(told[0], RequestError)  # it is not the client's fault
        with pytest.raises(DllmError, match="model: its output for this request is no number"):
            raise told[0]
        progress = [one async for one in loop.stream(good)]
        return progress[-1]

    assert asyncio.run(asyncio.wait_for(scenario(), 30)).tokens == alone.tokens


def test_a_loop_that_hangs_is_unhealthy_and_an_idle_one_is_not(monkeypatch):
    async def scenario():
        engine = StuckEngine()
        loop = DecodingLoop(engine, max_waiting=4)
        for _ in range(3):
            await asyncio.sleep(0.05)
            loop.check()  # idle, for longer than a tick may take
        row = asyncio.create_task(anext(loop.stream(REQUEST)))
        await asyncio.sleep(0.01)
        loop.check()
        await asyncio.sleep(0.1)
        with pytest.raises(RuntimeError, match="hangs"):
            loop.check()
        row.cancel()
        engine.released.set()
        await asyncio.wait([row])

    monkeypatch.setattr("workflows.serve.loop._HUNG_AFTER_S", 0.05)
    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_loop_tells_the_calls_that_are_still_to_come_and_how_busy_it_was(small_bundle):
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=8, policy={"type": "low_confidence"})

    async def scenario():
        loop = DecodingLoop(Engine(read_bundle(small_bundle)), max_waiting=8)
        assert loop.work == 0
        told, left = loop.stream(Request((7, 8), config, seed=1), "canvas"), []
        async for _ in told:
            left.append(loop.work)
        assert left == sorted(left, reverse=True)
        assert 1 <= left[0] < 8
        assert 0 < loop.busy_share() <= 1
        await asyncio.sleep(0.05)
        assert loop.busy_share() == 0
        while loop.work:
            await asyncio.sleep(0.01)
        await loop.close()

    asyncio.run(asyncio.wait_for(scenario(), 30))
