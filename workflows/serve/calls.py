"""Calls: a request's rows on their way to replicas and back, in as few messages as keep the replicas evenly loaded.

A replica that dies costs a retry, not an answer: the rows that were not finished are sent again, and since the seed is
fixed before the first try, each choice knows how much of its text it has given already. So does one that has ceased to
decode, for the calls that come after, and one that has another bundle by the model's name.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc  # type: ignore[import-untyped]
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from dllm_core.evaluation.question import AnswerScore
from workflows.serve.choice import Choice
from workflows.serve.dialect.rows import ServedModel
from workflows.serve.progress import Detail, ElsewhereError, Told
from workflows.serve.routing import num_replicas

# Of a replica that is gone, and of one that has begun nothing: by gRPC its own errors come as they are, else wrapped.
_MAY_HELP = (RayError, grpc.RpcError, ElsewhereError)
_TRIES = 4
_LEAST_ROWS = 8  # of a call, where a request has them: its messages cost as much for one row as for many
_PING_EVERY_S = 15.0
_TOLD_WITHIN_S = 5.0


@dataclass(frozen=True)
class News:
    """New text of a choice, whether it has ended, and what `seen` made of it just then."""

    choice: Choice
    text: str
    is_ended: bool
    shown: Any = None
    gap: float | None = None


class _GoneError(RayError):  # type: ignore[misc]
    """A replica ended a call that nobody here has given up."""


async def news_of(
    replicas: DeploymentHandle,
    model: ServedModel,
    choices: Sequence[Choice],
    detail: Detail,
    deadline: float,
    seen: Callable[[Choice], Any] = lambda choice: None,
) -> AsyncGenerator[list[News], None]:
    """What comes in together of whichever choices, until all have ended; nothing where it is time for a ping.

    Choices go on while what they told waits to be sent. Raises TimeoutError at `deadline`, on the monotonic clock, and
    whatever ended a row; leaving frees all rows.
    """
    inbox: asyncio.Queue[list[News] | BaseException] = asyncio.Queue()

    async def follow(part: Sequence[Choice]) -> None:
        try:
            async for news in _followed(replicas, model, part, detail, seen):
                inbox.put_nowait(news)
        except Exception as error:  # noqa: BLE001 (raised where it is waited for)
            inbox.put_nowait(error)

    tasks = [asyncio.create_task(follow(part)) for part in parts_of(choices, num_replicas())]
    still_open = len(choices)
    try:
        while still_open:
            left = deadline - time.monotonic()
            try:
                async with asyncio.timeout(min(_PING_EVERY_S, left)):
                    news = await inbox.get()
            except TimeoutError:
                if left <= _PING_EVERY_S:
                    raise
                yield []
                continue
            if isinstance(news, BaseException):
                raise news
            still_open -= sum(one.is_ended for one in news)
            yield news
    finally:
        for task in tasks:
            task.cancel()


def parts_of(choices: Sequence[Choice], replicas: int) -> list[Sequence[Choice]]:
    """The choices of each call: one for all, or one for each of the replicas that there are rows enough for."""
    count = max(1, min(replicas, len(choices) // _LEAST_ROWS))
    edges = [len(choices) * number // count for number in range(count + 1)]
    return [choices[start:stop] for start, stop in itertools.pairwise(edges)]


async def _followed(
    replicas: DeploymentHandle,
    model: ServedModel,
    part: Sequence[Choice],
    detail: Detail,
    seen: Callable[[Choice], Any],
) -> AsyncGenerator[list[News], None]:
    """One call's news; those of its rows that are open when its replica dies are tried again elsewhere."""
    for attempt in range(_TRIES):
        part = [choice for choice in part if choice.finish_reason is None]
        for choice in part:
            choice.begin()
        try:
            async with contextlib.aclosing(_call(replicas, model, part, detail)) as messages:
                async for message in messages:
                    if news := [one for place, row in message if (one := _taken(part[place], row, seen)) is not None]:
                        yield news
                    if all(choice.finish_reason is not None for choice in part):
                        return
            raise AssertionError("a call ended before its rows")
        except _MAY_HELP as error:
            await _before_another_try(error, attempt)


async def scores_of(replicas: DeploymentHandle, *asked: Any) -> tuple[list[AnswerScore], str]:
    """What a replica's `score` answers; one that dies costs a retry here too, and they are the same from any."""
    for attempt in itertools.count():
        try:
            with _told_of_the_gone():
                found: tuple[list[AnswerScore], str] = await replicas.score.remote(*asked)
                return found
        except _MAY_HELP as error:
            await _before_another_try(error, attempt)
    raise AssertionError


async def told_by_all(handle: DeploymentHandle, method: str) -> list[Any]:
    """What each replica of a deployment answers, or what went wrong there; one that hangs hides no other."""
    try:
        async with asyncio.timeout(_TOLD_WITHIN_S):
            asked = await handle.broadcast(method)._fetch_replica_results_async()  # its own timeout is of all together
    except DeploymentUnavailableError:  # there is none
        return []
    except (RayError, RayServeException, TimeoutError) as error:
        return [error]
    answers = (asyncio.wait_for(one.get_async(), _TOLD_WITHIN_S) for one in asked)
    return list(await asyncio.gather(*answers, return_exceptions=True))


async def _before_another_try(error: Exception, attempt: int) -> None:
    """Wait for it, or raise the error where another try would be of no use."""
    says_no = isinstance(error, RayTaskError) and not isinstance(error.cause, ElsewhereError)  # and lives
    if says_no or attempt == _TRIES - 1:
        raise error
    await asyncio.sleep(0.1 * 4**attempt)


@contextlib.contextmanager
def _told_of_the_gone() -> Iterator[None]:
    """A cancellation that nobody here has asked for is how Ray Serve tells of a replica that shuts down."""
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise _GoneError("the replica ended the call") from None


def _taken(choice: Choice, row: Any, seen: Callable[[Choice], Any]) -> News | None:
    if isinstance(row, Exception):
        raise row
    if choice.finish_reason is not None:  # a stop string ended it here before it did there
        return None
    ahead = choice.row.head if choice.progress is None else ""  # with the first piece: what is refused has no text
    text = ahead + choice.take(row)
    return News(choice, text, choice.finish_reason is not None, seen(choice), choice.gap)


async def _call(
    replicas: DeploymentHandle, model: ServedModel, part: Sequence[Choice], detail: Detail
) -> AsyncGenerator[Told, None]:
    """A replica's messages of some rows. Leaving early frees them."""
    requests = tuple(choice.row.request for choice in part)
    messages = replicas.options(stream=True).decode.remote(
        model.name, model.digest, requests, detail, part[0].row.end_id
    )
    try:
        with _told_of_the_gone():
            async for message in messages:
                yield message
    finally:
        messages.cancel()
