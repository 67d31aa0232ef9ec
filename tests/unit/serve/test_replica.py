"""The replica's own law: what it serves may change at any moment, and no request pays for it."""

import asyncio
import threading
from contextlib import aclosing

import pytest
from conftest import runs_by_kind
from local_endpoint import REPLICA

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.decoding.automaton import compile_regex
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.request import Request
from dllm_core.errors import CheckpointError
from dllm_core.evaluation.question import Question
from dllm_core.model.recorder import Recorder
from workflows.serve.hosted import GivenUpError, HostedModel
from workflows.serve.loop import DecodingLoop
from workflows.serve.progress import LoopEndedError, NotLoadedError
from workflows.serve.replica import DecodeReplica
from workflows.serve.routing import STANDS_STILL

DECODE = DecodeConfig(max_tokens=24, block_length=1, steps_per_block=1, temperature=1.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function: of two kinds, whose weights and tokenizers differ, the run."""
    of = runs_by_kind(tmp_path_factory, {"first": {}, "second": {"tokenizer": {"vocab_size": 290}}})
    return lambda kind: of(kind)[1]


def said_of(run):
    return {"run": run.url, "decode": DECODE.model_dump(mode="json")}


async def text_of(replica, digest, on_message=lambda: None):
    """The tokens of one row to its end; on_message is awaited for after each message."""
    async with aclosing(replica.decode("m", digest, [Request((1,), DECODE, seed=3)], "canvas")) as messages:
        async for told in messages:
            [(_, progress)] = told
            if (wait := on_message()) is not None:
                await wait
    return progress.tokens


@pytest.mark.parametrize("asks", [True, False])
def test_a_replica_that_decodes_no_more_ends_soon_after_whoever_waits_is_told(runs, asks, monkeypatch):
    async def scenario():
        replica, ended = DecodeReplica(REPLICA), asyncio.Event()
        monkeypatch.setattr(replica, "end_process", ended.set)
        await replica.reconfigure({"m": said_of(runs("first"))})
        request, digest = Request((1,), DECODE), read_bundle(runs("first")).digest
        engine = replica._models["m"].engine
        await anext(replica.decode("m", digest, [request], "end"))
        await replica.check_health()
        assert await replica.record_routing_stats() == {STANDS_STILL: False}
        monkeypatch.setattr(DecodingLoop, "stands_still", True)
        assert await replica.record_routing_stats() == {STANDS_STILL: True}
        monkeypatch.setattr(engine, "step", lambda: 1 // 0)
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            await anext(replica.decode("m", digest, [request], "end"))
        assert not ended.is_set()
        with pytest.raises(LoopEndedError):
            await (anext(replica.decode("m", digest, [request], "end")) if asks else replica.check_health())
        await ended.wait()

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_a_model_that_another_takes_the_place_of_answers_what_was_asked_of_it_and_is_closed(runs, monkeypatch):
    async def scenario():
        replica = DecodeReplica(REPLICA)
        first, second = (read_bundle(runs(kind)).digest for kind in ("first", "second"))
        await replica.reconfigure({"m": said_of(runs("first"))})
        expected, begun, swapped = await text_of(replica, first), asyncio.Event(), asyncio.Event()

        def on_message():
            begun.set()
            return swapped.wait()

        row = asyncio.create_task(text_of(replica, first, on_message))
        await begun.wait()
        old = replica._models["m"]
        await replica.reconfigure({"m": said_of(runs("second"))})
        late = await text_of(replica, first)  # of a gateway that has not heard of it
        other = await text_of(replica, second)
        swapped.set()
        assert await row == late == expected != other
        while replica._closing:
            await asyncio.sleep(0.01)
        with pytest.raises(NotLoadedError, match="'m' is not loaded"):
            await text_of(replica, first)
        with pytest.raises(LoopEndedError):
            old.loop.check()
        assert await text_of(replica, second) == other
        await replica.reconfigure({})

    monkeypatch.setattr("workflows.serve.replica._IDLE_S", 0.2)
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_a_model_that_cannot_be_loaded_beside_others_costs_them_nothing(runs, monkeypatch):
    async def scenario():
        replica, digest = DecodeReplica(REPLICA), read_bundle(runs("first")).digest
        first, bad = said_of(runs("first")), {"run": "/nowhere/runs/bad-0123456789ab"}
        with pytest.raises(CheckpointError, match="there is no bundle"):
            await replica.reconfigure({"bad": bad})  # a replica with nothing to serve must not begin
        with pytest.raises(CheckpointError, match="has changed since it was deployed"):
            await replica.reconfigure({"m": {**first, "digest": read_bundle(runs("second")).digest}})
        first["digest"] = digest
        await replica.reconfigure({"m": first})
        expected, served = await text_of(replica, digest), replica._models["m"]
        for models in ({"m": first, "bad": bad}, {"m": bad}):
            await replica.reconfigure(models)
            assert replica._models == {"m": served}
            assert (await replica.load())["not_loaded"] == (list(models)[-1],)
            assert await text_of(replica, digest) == expected
        await replica.reconfigure({"m": first})
        assert (await replica.load())["not_loaded"] == ()
        assert replica._models == {"m": served}
        await replica.reconfigure({})

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_a_model_that_is_kept_busy_for_ever_is_closed_when_its_time_is_over(runs, monkeypatch):
    async def scenario():
        replica, digest = DecodeReplica(REPLICA), read_bundle(runs("first")).digest
        await replica.reconfigure({"m": said_of(runs("first"))})
        engine, held = replica._models["m"].engine, threading.Event()
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: (held.wait(0.05), step())[1])
        row = asyncio.create_task(text_of(replica, digest))
        await replica.reconfigure({})
        with pytest.raises(RuntimeError, match="decoding failed"):
            await row

    monkeypatch.setattr("workflows.serve.replica._DRAIN_S", 0.3)
    monkeypatch.setattr("workflows.serve.replica._IDLE_S", 0.1)
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_an_expression_is_compiled_once_for_all_who_wait_and_a_model_that_is_dropped_meanwhile_keeps_it(
    runs, monkeypatch
):
    compiled, dropped = [], asyncio.Event()

    class Slow:
        """A compiler that is done when the model has been dropped for a while, unless it is closed."""

        def __init__(self, spelled, seconds):
            self._spelled, self._is_closed = spelled, False

        async def compile(self, regex):
            compiled.append(regex)
            await dropped.wait()
            await asyncio.sleep(0.3)
            assert not self._is_closed
            return compile_regex(regex, self._spelled)

        def close(self):
            self._is_closed = True

    async def scenario():
        replica, digest = DecodeReplica(REPLICA), read_bundle(runs("first")).digest
        await replica.reconfigure({"m": said_of(runs("first"))})

        async def one():
            request = Request((1,), DECODE, constraint="[0-9]{2}")
            return [told async for told in replica.decode("m", digest, [request], "end")]

        rows = [asyncio.create_task(one()) for _ in range(3)]
        while not compiled:
            await asyncio.sleep(0.001)
        await replica.reconfigure({})
        dropped.set()
        for [[(_, end)]] in await asyncio.gather(*rows):
            assert end.finish_reason == "stop"
        while replica._closing:
            await asyncio.sleep(0.01)

    monkeypatch.setattr("workflows.serve.hosted.Compiler", Slow)
    monkeypatch.setattr("workflows.serve.replica._IDLE_S", 0.1)
    asyncio.run(asyncio.wait_for(scenario(), 30))
    assert compiled == ["[0-9]{2}"]


def test_a_score_that_nobody_waits_for_ends_at_its_next_call_and_keeps_no_place(runs, monkeypatch):
    async def scenario():
        replica, digest = DecodeReplica(REPLICA), read_bundle(runs("first")).digest
        await replica.reconfigure({"m": said_of(runs("first"))})
        denoiser, calls, held = replica._models["m"].engine.denoiser, [], threading.Event()
        forward = denoiser.forward

        def slowly(*args, **options):
            calls.append(None)
            if len(calls) == 3:
                held.wait(20)
            return forward(*args, **options)

        monkeypatch.setattr(denoiser, "forward", slowly)
        asked = ("m", digest, [Question((1,), tuple(range(5, 15)))], 256, None, 0)
        score = asyncio.create_task(replica.score(*asked))
        while len(calls) < 3:
            await asyncio.sleep(0.001)
        [work] = replica._scoring
        await replica.reconfigure({"m": said_of(runs("first")), "n": said_of(runs("second"))})
        assert not work.done()  # a load waits for no score
        score.cancel()
        await asyncio.wait([score])
        held.set()
        while replica._scoring:
            await asyncio.sleep(0.001)
        assert isinstance(work.exception(), GivenUpError)
        assert len(calls) == 3
        await replica.reconfigure({})

    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_what_would_be_compiled_under_a_clients_request_is_compiled_before_there_is_one(runs):
    hosted = HostedModel(read_bundle(runs("first")), REPLICA)
    recorder = hosted.engine.denoiser.recorder = Recorder(hosted.engine.denoiser, record=lambda run: run)
    hosted.warm_up(DecodeConfig(max_tokens=24, block_length=16, steps_per_block=2))
    shapes = [key[0] for key in recorder.held]
    assert sorted({rows for rows, _ in shapes}) == [1, 2]
