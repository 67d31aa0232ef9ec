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
from dllm_core.noise.process import UniformNoise
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig
from workflows.serve.loop import DecodingLoop
from workflows.serve.progress import LoopEndedError

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
        self.fill, self.eos_id = 0.0, 0

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


class PacedEngine(Engine):
    """An engine whose ticks each wait to be allowed, and which notes the rows that each begins with."""

    def __init__(self, bundle):
        super().__init__(bundle)
        self.allowed, self.rows_of_ticks = threading.Semaphore(0), []

    def step(self):
        self.rows_of_ticks.append(self.num_active + self.num_waiting)
        assert self.allowed.acquire(timeout=10)
        return super().step()


async def until(holds):
    while not holds():
        await asyncio.sleep(0.001)


async def ends_of(loop, requests, **options):
    """What each row of a call ends with."""
    ends = [None] * len(requests)
    async for told in loop.stream(requests, **options):
        for place, one in told:
            ends[place] = one
    return ends


def test_a_row_too_many_is_refused_at_once_while_the_loop_is_busy_and_leaving_makes_room():
    async def scenario():
        engine = StuckEngine()
        loop = DecodingLoop(engine, max_waiting=2)
        rows = [asyncio.create_task(anext(loop.stream([REQUEST]))) for _ in range(2)]
        await asyncio.sleep(0.05)
        assert loop.load == {"running": 0, "waiting": 2}
        with pytest.raises(BackPressureError) as refused:
            await anext(loop.stream([REQUEST]))
        assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)
        for row in rows:
            row.cancel()
        engine.released.set()
        await asyncio.wait(rows)
        while loop.load["waiting"]:
            await asyncio.sleep(0.01)
        assert engine.cancelled == [1, 2]
        with pytest.raises(TimeoutError):  # admitted: it waits for its tokens
            await asyncio.wait_for(anext(loop.stream([REQUEST])), 0.1)

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
            told = [progress async for [(_, progress)] in loop.stream([request])]
            assert all(progress.tokens == told[-1].tokens[: len(progress.tokens)] for progress in told)
            return told[-1]

        return await asyncio.gather(*map(last, requests))

    told = asyncio.run(asyncio.wait_for(scenario(), 30))
    for progress, request in zip(told, requests, strict=True):
        [answer] = Engine(bundle).generate([request])
        assert (progress.tokens, progress.num_calls) == (answer.tokens, answer.num_calls)
        assert (progress.num_committed, progress.finish_reason) == (answer.num_committed, answer.finish_reason)


def test_alternatives_are_what_a_call_gives_any_probability(small_bundle):
    """Of replaced tokens the last step leaves a single one at temperature 0; the logarithm of 0 is no JSON."""
    bundle = read_bundle(small_bundle)
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update={"process": UniformNoise()}))
    request = Request((7,), DecodeConfig(max_tokens=4, steps=3), top_logprobs=5)

    async def scenario():
        loop = DecodingLoop(Engine(bundle), max_waiting=8)
        ends = await ends_of(loop, [request], detail="commits")
        await loop.close()
        return ends

    [end] = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert [commit.best for commit in end.commits] == [((token, 0.0),) for token in end.tokens]
    assert len(end.commits) == 4


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
            *(anext(loop.stream([request])) for request in (bad, good)),
        )
        [[(_, failure)], _] = told
        assert not isinstance(failure, RequestError)  # it is not the client's fault
        with pytest.raises(DllmError, match="model: its output for this request is no number"):
            raise failure
        # In one call too it fails alone, as does a row that cannot be decoded.
        ends = await ends_of(loop, [good, bad, replace(good, prompt=(1,) * 999), good])
        assert [isinstance(end, Exception) for end in ends] == [False, True, True, False]
        assert isinstance(pickle.loads(pickle.dumps(ends[2])), RequestError)
        assert ends[0].tokens == ends[3].tokens
        return ends[0]

    assert asyncio.run(asyncio.wait_for(scenario(), 30)).tokens == alone.tokens


def test_a_loop_that_hangs_is_unhealthy_and_an_idle_one_is_not(monkeypatch):
    async def scenario():
        engine = StuckEngine()
        loop = DecodingLoop(engine, max_waiting=4)
        for _ in range(3):
            await asyncio.sleep(0.05)
            loop.check()  # idle, for longer than a tick may take
            assert not loop.stands_still
        row = asyncio.create_task(anext(loop.stream([REQUEST])))
        while not loop.stands_still:
            await asyncio.sleep(0.005)
        loop.check()
        await asyncio.sleep(0.3)
        with pytest.raises(LoopEndedError, match="hangs"):
            loop.check()
        row.cancel()
        engine.released.set()
        await asyncio.wait([row])

    monkeypatch.setattr("workflows.serve.loop._HUNG_AFTER_S", 0.25)
    monkeypatch.setattr("workflows.serve.loop._STANDS_STILL_AFTER_S", 0.02)
    asyncio.run(asyncio.wait_for(scenario(), 10))


class FailingEngine(StuckEngine):
    """Its second row cannot be added, for a reason that is nobody's request."""

    def add(self, request):
        if self.num_waiting == 1:
            raise MemoryError("no slot")
        return super().add(request)


def test_a_loop_that_fails_to_add_a_row_tells_all_who_wait_and_lets_nobody_in():
    async def scenario():
        loop = DecodingLoop(FailingEngine(), max_waiting=9)
        calls = [asyncio.create_task(anext(loop.stream([REQUEST] * rows))) for rows in (1, 2, 1)]
        told = await asyncio.gather(*calls, return_exceptions=True)
        assert [type(one) for one in told] == [RuntimeError] * 3  # LoopEndedError would say: try it elsewhere
        with pytest.raises(LoopEndedError, match="has ended"):
            await anext(loop.stream([REQUEST]))

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_loop_tells_the_calls_that_are_still_to_come_and_how_busy_it_was(small_bundle):
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=8, policy={"type": "low_confidence"})

    async def scenario():
        loop = DecodingLoop(Engine(read_bundle(small_bundle)), max_waiting=8)
        assert loop.work == 0
        told, left = loop.stream([Request((7, 8), config, seed=1)], "canvas"), []
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


@EVERY_DECODER
def test_rows_of_a_call_are_told_in_one_message_a_tick_what_each_engine_answers_alone(small_bundle, said):
    bundle = read_bundle(small_bundle)
    bundle = replace(bundle, manifest=bundle.manifest.model_copy(update=said))
    config = DecodeConfig(block_length=4, steps_per_block=4, max_tokens=9, temperature=1)
    requests = [Request(prompt=(7, 8, 9)[: n % 4], config=config, seed=n) for n in range(12)]

    async def scenario():
        loop = DecodingLoop(Engine(bundle), max_waiting=8)
        messages = [told async for told in loop.stream(requests, "canvas")]
        ends = await ends_of(loop, requests, detail="end")
        await loop.close()
        return messages, ends

    messages, ends = asyncio.run(asyncio.wait_for(scenario(), 30))
    assert max(len(told) for told in messages) == len(requests)
    assert len(messages) == max(end.num_calls for end in ends)
    for end, request in zip(ends, requests, strict=True):
        [answer] = Engine(bundle).generate([request])
        assert (end.tokens, end.num_calls) == (answer.tokens, answer.num_calls)


def test_ticks_that_nobody_is_told_of_follow_one_another_and_end_with_the_loop(small_bundle):
    """The event loop never runs while the thread ticks on, and still hears of the end, and still ends it."""
    config = DecodeConfig(block_length=1, steps_per_block=1, max_tokens=24, policy={"type": "low_confidence"})

    async def scenario():
        engine = PacedEngine(read_bundle(small_bundle))
        loop = DecodingLoop(engine, max_waiting=64)
        began = asyncio.create_task(ends_of(loop, [Request((7, 8), config)], detail="end"))
        await until(lambda: engine.rows_of_ticks)
        engine.allowed.release(24)
        while len(engine.rows_of_ticks) < 24:  # on its own: nothing is awaited
            time.sleep(0.001)
        [end] = await began
        assert end.num_calls == 24
        left = asyncio.create_task(ends_of(loop, [Request((7, 8), config)], detail="end"))
        engine.allowed.release()
        await until(lambda: len(engine.rows_of_ticks) == 26)
        closing = asyncio.create_task(loop.close())
        await asyncio.sleep(0)
        engine.allowed.release(1000)
        await closing
        with pytest.raises(RuntimeError, match="decoding failed"):
            await left
        await asyncio.sleep(0.05)
        assert len(engine.rows_of_ticks) == 26

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_leaving_a_call_frees_all_of_its_rows_before_the_next_tick_and_no_other(small_bundle):
    config = DecodeConfig(block_length=1, steps_per_block=1, max_tokens=24, policy={"type": "low_confidence"})
    requests = [Request((7, 8), config, seed=seed) for seed in range(12)]

    async def scenario():
        engine = PacedEngine(read_bundle(small_bundle))
        loop = DecodingLoop(engine, max_waiting=64)
        neighbour = asyncio.create_task(ends_of(loop, requests[:1]))
        await asyncio.sleep(0)  # its row is asked for: both are taken in by the same tick
        call = loop.stream(requests[1:], "canvas")
        engine.allowed.release()
        await anext(call)
        await until(lambda: len(engine.rows_of_ticks) == 2)  # a tick has begun and holds all rows
        await call.aclose()
        engine.allowed.release(1000)
        await until(lambda: len(engine.rows_of_ticks) > 2)
        assert engine.rows_of_ticks[:3] == [12, 12, 1]
        waiting = asyncio.create_task(anext(loop.stream(requests[1:])))  # left before it was taken in
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        [end] = await neighbour
        assert loop.load == {"running": 0, "waiting": 0}
        assert loop.work == 0
        return end

    [alone] = Engine(read_bundle(small_bundle)).generate(requests[:1])
    assert asyncio.run(asyncio.wait_for(scenario(), 30)).tokens == alone.tokens


def test_a_request_larger_than_the_queue_is_let_in_where_nothing_waits_and_refused_whole_where_something_does():
    async def scenario():
        engine = StuckEngine()
        loop = DecodingLoop(engine, max_waiting=4)
        large = asyncio.create_task(anext(loop.stream([REQUEST] * 6)))
        await asyncio.sleep(0.05)
        assert loop.load["waiting"] == 6
        with pytest.raises(BackPressureError):
            await anext(loop.stream([REQUEST] * 2))
        assert loop.load["waiting"] == 6
        large.cancel()
        engine.released.set()
        await asyncio.wait([large])

    asyncio.run(asyncio.wait_for(scenario(), 10))


def test_a_token_that_ends_the_answer_ends_its_row_and_frees_it(small_bundle):
    config = DecodeConfig(block_length=1, steps_per_block=1, max_tokens=24, temperature=1)
    request = Request((7, 8), config, seed=5)
    [alone] = Engine(read_bundle(small_bundle)).generate([request])
    end_id = alone.tokens[3]

    async def scenario():
        engine = Engine(read_bundle(small_bundle))
        loop = DecodingLoop(engine, max_waiting=8)
        ended, other = await asyncio.gather(
            ends_of(loop, [request] * 2, detail="end", end_id=end_id), ends_of(loop, [request])
        )
        assert loop.load == {"running": 0, "waiting": 0}
        return ended, other

    ended, [other] = asyncio.run(asyncio.wait_for(scenario(), 30))
    at = alone.tokens.index(end_id)
    for one in ended:
        assert (one.tokens, one.finish_reason, one.num_calls) == (alone.tokens[: at + 1], "stop", at + 1)
    assert other.tokens == alone.tokens


def test_an_engine_tells_how_full_its_last_tick_was_in_rows_or_in_positions(small_bundle):
    config = DecodeConfig(block_length=1, steps_per_block=1, max_tokens=16, policy={"type": "low_confidence"})
    for room, share in ((1 << 20, 2 / 64), (128, 0.5)):  # 32 positions a row
        engine = Engine(read_bundle(small_bundle), max_batch_tokens=room)
        for seed in range(2):
            engine.add(Request((7,) * 16, config, seed=seed))
        engine.step()
        assert engine.fill == share
    for seed in range(6):
        engine.add(Request((7,) * 16, config, seed=seed))
    engine.step()
    assert engine.fill == 1.0
