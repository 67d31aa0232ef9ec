"""Answering: rows in, text out. Deadlines, streams and frames; no routes.

Whatever ends a request early (a deadline, a refusal, a client that left) frees all of its rows.
"""

import contextlib
import json
import math
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from dllm_core.errors import DllmError
from workflows.serve.calls import News, news_of
from workflows.serve.choice import Choice
from workflows.serve.dialect.errors import ApiError, busy, late, unavailable
from workflows.serve.dialect.fields import DiffusionOptions, StreamOptions
from workflows.serve.dialect.rows import Row, ServedModel
from workflows.serve.metrics import GatewayMetrics
from workflows.serve.progress import Detail, NotLoadedError
from workflows.serve.room import Places

_PING = b": ping\n\n"


class Dialect(Protocol):
    """A route's request: what it asks for, and the shape that it is answered in."""

    id_prefix: ClassVar[str]
    object: ClassVar[str]
    chunk_object: ClassVar[str]

    @property
    def n(self) -> int:
        """Choices of each prompt; they stand side by side."""

    @property
    def stream_options(self) -> StreamOptions | None:
        """How a stream ends."""

    @property
    def diffusing(self) -> bool:
        """Whether the stream is of frames."""

    @property
    def diffusion(self) -> DiffusionOptions:
        """How the canvas is filled and shown."""

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives are told beside each token's log-probability; None: not even that."""

    @property
    def names(self) -> dict[str, str]:
        """What the engine calls otherwise than the body."""

    def choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """One choice of a whole answer."""

    def piece(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """The next of its pieces in a stream."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """What a stream says of a choice before its text."""

    def told(self, entries: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any]:
        """Log-probabilities of tokens, each of which begins so many characters into the text."""


def explained(error: BaseException, names: Mapping[str, str] | None = None) -> ApiError:
    """What the client is told: our own refusals by name, everything else as a server error. names: as `ApiError.of`."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, DllmError):
        return ApiError.of(cause, names)
    if isinstance(cause, BackPressureError):
        return busy()
    if isinstance(cause, NotLoadedError):
        return unavailable(str(cause))
    if isinstance(cause, RayError):
        return unavailable("the decode replicas keep failing")
    return unavailable(f"decoding broke off ({type(cause).__name__})")


class Answering:
    """One request on its way to its answer."""

    def __init__(
        self,
        replicas: DeploymentHandle,
        model: ServedModel,
        asked: Dialect,
        rows: Sequence[Row],
        metrics: GatewayMetrics,
        places: Places,
        begun: float,
        deadline: float,
    ) -> None:
        """places: the rows', given back as they end; begun, deadline: on the monotonic clock, seconds."""
        self._replicas, self._model, self._asked, self._metrics = replicas, model, asked, metrics
        self._places, self._begun, self._deadline = places, begun, deadline
        self._id, self._created = f"{asked.id_prefix}-{secrets.token_hex(12)}", math.floor(time.time())
        wanted = asked.wanted_logprobs
        self._choices = [Choice(i, row, model.tokenizer, begun, wanted) for i, row in enumerate(rows)]

    async def whole(self) -> dict[str, Any]:
        """All choices, decoded to their end; the first that fails ends the others."""
        detail: Detail = "end" if self._asked.wanted_logprobs is None else "commits"
        async with contextlib.aclosing(self._told(detail)) as told:
            async for _ in told:
                pass
        return self._body(self._asked.object, [self._finished(choice) for choice in self._choices], self.usage)

    def _finished(self, choice: Choice) -> dict[str, Any]:
        entries = choice.new_entries()
        told = None if entries is None else self._asked.told(*entries)
        body = self._asked.choice(choice.index, choice.whole_text, told, choice.finish_reason)
        return {**body, "holes": choice.holes} if choice.row.holes else body

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events of all choices as they come. A failure before the first is raised, later ones are told."""
        is_begun = False
        try:
            async with contextlib.aclosing(self._frames() if self._asked.diffusing else self._pieces()) as told:
                async for event in told:
                    yield event
                    is_begun = True
            options = self._asked.stream_options
            if options is not None and options.include_usage:
                yield _event(self._body(self._asked.chunk_object, [], self.usage))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            if not is_begun:
                raise
            self._metrics.failed(error.status)
            yield _event(error.body)

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        """Committed text alone, in order."""
        shape = self._asked

        def chunk(choice: dict[str, Any]) -> bytes:
            return _event(self._body(shape.chunk_object, [choice]))

        openings = {c.index: opening for c in self._choices if (opening := shape.opening(c.index)) is not None}
        ends_empty = bool(openings)  # a chat's last piece is
        detail: Detail = "tokens" if shape.wanted_logprobs is None else "commits"
        async with contextlib.aclosing(self._told(detail)) as told:
            async for together in told:
                pieces = list[bytes]()
                for news in together:
                    choice, text = news.choice, news.text
                    if news.gap is not None:
                        self._metrics.gap(news.gap)
                    if choice.index in openings:
                        pieces.append(chunk(openings.pop(choice.index)))
                    text += choice.row.tail if news.is_ended else ""
                    entries = choice.new_entries()
                    if not text and not (entries and entries[0]) and not news.is_ended:
                        continue
                    probs = None if entries is None else shape.told(*entries)
                    if news.is_ended and text and ends_empty:
                        pieces.append(chunk(shape.piece(choice.index, text, probs, None)))
                        text, probs = "", None
                    piece = shape.piece(choice.index, text, probs, choice.finish_reason if news.is_ended else None)
                    is_whole = news.is_ended and choice.row.holes
                    pieces.append(chunk({**piece, "holes": choice.holes} if is_whole else piece))
                if pieces or not together:
                    yield b"".join(pieces) or _PING

    async def _frames(self) -> AsyncGenerator[bytes, None]:
        """The canvas after each call, in the shape of Inception's API; then an empty piece for each choice."""
        async with contextlib.aclosing(self._told("canvas", self._frame)) as told:
            async for together in told:
                for news in together:
                    if news.gap is not None:
                        self._metrics.gap(news.gap)
                yield b"".join(_event(news.shown) for news in together) or _PING
        for choice in self._choices:
            body = {"index": choice.index, "delta": {}, "finish_reason": None}
            yield _event(self._body(self._asked.chunk_object, [body]))

    def _frame(self, choice: Choice) -> dict[str, Any]:
        """The canvas as it stands."""
        is_ended = choice.finish_reason is not None
        meta: dict[str, Any] = {"diffusion_content": True, "diffusion_progress": choice.progress_made(is_ended)}
        meta["num_calls"] = choice.num_calls
        delta = {"role": "assistant"}
        if self._asked.diffusion.frames == "changes":
            meta["changed"] = choice.changes()
        if self._asked.diffusion.frames == "whole" or is_ended:
            delta["content"] = choice.whole_text if is_ended else choice.provisional_text()
        body = {"index": choice.index, "delta": delta, "finish_reason": choice.finish_reason}
        if is_ended and choice.row.holes:
            body["holes"] = choice.holes
        return {**self._body(self._asked.chunk_object, [body]), "diffusion_meta": meta}

    async def _told(
        self, detail: Detail, seen: Callable[[Choice], Any] = lambda choice: None
    ) -> AsyncGenerator[list[News], None]:
        """What comes in together; nothing where it is time for a ping. A choice's place is free when it has ended."""
        call = (self._replicas, self._model, self._choices, detail, self._deadline, seen)
        try:
            async with contextlib.aclosing(news_of(*call)) as coming:
                async for together in coming:
                    for news in together:
                        if news.is_ended:
                            self._places.give_back()
                            self._count(news.choice)
                    yield together
        except TimeoutError:
            raise late(self._deadline - self._begun) from None
        except Exception as error:
            raise explained(error, self._asked.names) from error
        finally:
            self._places.end()

    def _body(self, kind: str, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
        """An answer, or one chunk of a stream."""
        body = {"id": self._id, "object": kind, "created": self._created, "model": self._model.name}
        return {**body, "choices": choices, **({"usage": usage} if usage is not None else {})}

    def _count(self, choice: Choice) -> None:
        progress, request = choice.progress, choice.row.request
        assert progress is not None
        self._metrics.finished(
            reason=choice.finish_reason or "stop",
            prompt=0 if choice.index % self._asked.n else request.num_given,
            tokens=progress.num_committed,
            calls=progress.num_calls,
            canvas=request.num_asked,
            seconds=time.monotonic() - choice.begun,
            first=choice.first,
            waited=progress.waited_s,
        )

    @property
    def usage(self) -> dict[str, Any]:
        """Tokens and calls of all choices, each prompt counted once, and the decoding in force."""
        done = [choice.progress for choice in self._choices if choice.progress is not None]
        requests = [choice.row.request for choice in self._choices]
        prompt = sum(request.num_given for request in requests[:: self._asked.n])
        committed = sum(progress.num_committed for progress in done)
        calls = sum(progress.num_calls for progress in done)
        config = requests[0].config
        return {
            "prompt_tokens": prompt,
            "completion_tokens": committed,
            "total_tokens": prompt + committed,
            "diffusion": {
                "num_calls": calls,
                "tokens_per_call": round(committed / calls, 4) if calls else 0,
                "canvas_tokens": sum(request.num_asked for request in requests),
                "committed_tokens": committed,
                "cache": config.cache,
                "steps_per_block": config.steps_per_block,
                "block_length": config.block_length,
                "policy": config.policy.model_dump(mode="json"),
            },
        }


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"
