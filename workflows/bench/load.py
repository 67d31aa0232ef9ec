"""Loads: requests sent in a closed loop (so many at once) or an open one (so many a second), each timed.

An open loop goes on sending while answers wait, as users do, and so shows what a closed loop hides: a queue that grows.
Its times count from when a request was due, so that a client which falls behind hides no wait.
Times are of the client, on one clock. TTFC: to the first text that will not change. A request that is refused or breaks
off counts as such, and in no latency.
"""

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import httpx

Kind = Literal["closed", "open"]


@dataclass(frozen=True)
class Load:
    """One point of a sweep. level: requests at once (closed) or a second (open), for so many seconds."""

    kind: Kind
    level: float
    seconds: float


@dataclass(frozen=True)
class Mix:
    """What is asked: prompts and answer lengths, drawn by `seed`. body: more parameters of every request."""

    model: str
    prompts: Sequence[str]
    lengths: Sequence[int]
    body: dict[str, Any]
    seed: int = 0

    def request(self, number: int) -> dict[str, Any]:
        """The number-th request; the same for every load and run."""
        rng = random.Random(f"{self.seed}:{number}")
        asked = {"model": self.model, "prompt": rng.choice(self.prompts), "max_tokens": rng.choice(self.lengths)}
        return {"seed": number, **self.body, **asked, "stream": True, "stream_options": {"include_usage": True}}


@dataclass(frozen=True)
class Answered:
    """One request. status 0: no HTTP answer, or one that broke off; first, whole: seconds, None without an answer."""

    status: int
    began: float
    first: float | None
    whole: float | None
    tokens: int
    calls: int


async def drive(url: str, load: Load, mix: Mix, headers: dict[str, str], tell: Callable[[int], None]) -> list[Answered]:
    """Put the load on the endpoint; every request that was begun is waited for. tell: how many are done."""
    done: list[Answered] = []
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
    async with httpx.AsyncClient(limits=limits, timeout=httpx.Timeout(300, connect=10), headers=headers) as client:
        began = time.monotonic()

        async def one(number: int, due: float | None = None) -> None:
            done.append(await ask(client, url, mix.request(number), began, due))
            tell(len(done))

        if load.kind == "closed":
            await _closed(load, one, began)
        else:
            await _open(load, one, began, mix.seed)
    return done


async def _closed(load: Load, one: Callable[[int], Any], began: float) -> None:
    numbers = iter(range(1 << 40))

    async def client() -> None:
        while time.monotonic() - began < load.seconds:
            await one(next(numbers))

    await asyncio.gather(*(client() for _ in range(round(load.level))))


async def _open(load: Load, one: Callable[[int, float], Any], began: float, seed: int) -> None:
    """Arrivals of a Poisson process: waits between them are exponential."""
    rng, at, tasks = random.Random(f"arrivals:{seed}"), 0.0, []
    for number in range(1 << 40):
        at += rng.expovariate(load.level)
        if at >= load.seconds:
            break
        await asyncio.sleep(max(0.0, began + at - time.monotonic()))
        tasks.append(asyncio.create_task(one(number, began + at)))
    await asyncio.gather(*tasks)


async def ask(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], origin: float, due: float | None = None
) -> Answered:
    """One streamed completion. origin: the clock's zero; due: when it was to be sent, by default now."""
    first, tokens, calls, is_whole = None, 0, 0, False
    began = time.monotonic() if due is None else due
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                await answer.aread()
                return Answered(answer.status_code, began - origin, None, None, 0, 0)
            async for line in _lines(answer):
                data = line.removeprefix("data: ")
                if data == line:
                    continue
                if data == "[DONE]":
                    is_whole = True
                    break
                event = json.loads(data)
                if "error" in event:
                    break
                choices = event.get("choices") or []
                if first is None and any(choice.get("text") for choice in choices):
                    first = time.monotonic() - began
                usage = event.get("usage") or {}
                tokens = _counted(usage.get("completion_tokens"), tokens)
                calls = _counted((usage.get("diffusion") or {}).get("num_calls"), calls)
    except (httpx.HTTPError, ValueError, TypeError, AttributeError):  # the last two: events of another shape
        is_whole = False
    whole = time.monotonic() - began
    if not is_whole:
        return Answered(0, began - origin, None, None, 0, 0)
    return Answered(200, began - origin, first if first is not None else whole, whole, tokens, calls)


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """As server-sent events have them; httpx's own end at U+2028 too, and such characters are text of an answer."""
    left = b""
    async for some in answer.aiter_bytes():
        *whole, left = (left + some).split(b"\n")
        for line in whole:
            yield line.removesuffix(b"\r").decode()
    yield left.decode()


def _counted(told: Any, before: int) -> int:
    """What a usage tells, or what one before it did."""
    if told is None:
        return before
    if not isinstance(told, int):
        raise TypeError("no number of tokens or calls")
    return told
