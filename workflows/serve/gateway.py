"""Gateway: HTTP and text on one side, token ids and decode replicas on the other. Holds no weights.

A replica that dies costs a retry, not an answer: the seed is fixed before the first try, so the text is the same.
Whatever ends a request early (a deadline, a refusal, a client that left) frees all of its rows.
"""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.request import Request as DecodeRequest
from dllm_core.decoding.text import TextStream
from dllm_core.errors import DllmError, RequestError
from workflows.serve.metrics import GatewayMetrics
from workflows.serve.protocol import (
    MAX_BODY_BYTES,
    ApiError,
    CompletionRequest,
    choice_body,
    completion_body,
    completion_id,
    parse_request,
)
from workflows.serve.replica import Progress

_TRIES = 4
_PING_EVERY_S = 15.0
_LOAD_WITHIN_S = 5.0
_NO_REPLICA = (RayError, RayServeException, TimeoutError)
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

api = FastAPI(
    title="dllm",
    description="A diffusion language model behind OpenAI's completions dialect.",
    redirect_slashes=False,
)


@api.exception_handler(ApiError)
async def _api_error(_: Request, error: ApiError) -> JSONResponse:
    return JSONResponse(error.body, error.status, error.headers)


@api.exception_handler(RequestError)
async def _request_error(request: Request, error: RequestError) -> JSONResponse:
    return await _api_error(request, ApiError.of(error))


@api.exception_handler(HTTPException)
async def _http_error(request: Request, error: HTTPException) -> JSONResponse:
    known = {404: f"there is no route {request.url.path}", 405: f"{request.method} is not allowed here"}
    message = known.get(error.status_code, str(error.detail))
    return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)


@api.exception_handler(RequestValidationError)
async def _validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse(ApiError(400, str(error.errors()[0]["msg"])).body, 400)


@api.exception_handler(Exception)
async def _any_error(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse(ApiError(500, type(error).__name__, kind="server_error").body, 500)


@dataclass
class _Choice:
    """One row of an answer: its request, its text so far, what it has cost."""

    index: int
    request: DecodeRequest
    text: TextStream
    echo: str
    begun: float
    first: float | None = None
    progress: Progress | None = None
    finish_reason: str | None = None

    def take(self, progress: Progress) -> str:
        """New text of this choice."""
        self.progress = progress
        if progress.num_committed and self.first is None:
            self.first = time.monotonic() - self.begun
        new = self.text.push(progress.tokens, last=progress.finish_reason is not None)
        self.finish_reason = "stop" if self.text.stopped else progress.finish_reason
        return new


# Ray Serve copies the class below when it is decorated: what it calls must stand above it.
async def _body(http: Request) -> bytes:
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, not {kind}")
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return body


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def _busy() -> ApiError:
    headers = {"Retry-After": "1"}
    return ApiError(429, "all replicas are busy", kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def _late(timeout_s: float) -> ApiError:
    return ApiError(408, f"no answer within {timeout_s:g} s", kind="timeout_error", code="request_timeout")


async def _joined(first: bytes, others: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    yield first
    async for other in others:
        yield other


def _explained(error: Exception) -> ApiError:
    """What the client is told: our own refusals by name, everything else as a server error."""
    cause = getattr(error, "cause", None) or error
    if isinstance(cause, ApiError):
        return cause
    if isinstance(cause, DllmError):
        return ApiError.of(cause)
    if isinstance(cause, BackPressureError):
        return _busy()
    if isinstance(cause, RayError):
        return ApiError(503, "the decode replicas keep failing", kind="server_error")
    return ApiError(503, f"decoding broke off ({type(cause).__name__})", kind="server_error")


@serve.deployment
@serve.ingress(api)
class Gateway:
    """The Ray Serve ingress."""

    def __init__(
        self, replicas: DeploymentHandle, run_url: str, model: str, decode: dict[str, Any], timeout_s: float
    ) -> None:
        bundle = read_bundle(RunDir.at(run_url))
        self._replicas, self._model, self._timeout_s = replicas, model, timeout_s
        self._tokenizer = bundle.tokenizer()
        self._context = int(json.loads((bundle.folder / "config.json").read_bytes())["context_length"])
        self._decode = DecodeConfig.checked(decode)
        self._created = int(time.time())
        self._metrics = GatewayMetrics()

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """200 if the replica that a request would go to runs its decoding loop (or is idle), 503 if not."""
        try:
            await asyncio.wait_for(self._replicas.load.remote(), _LOAD_WITHIN_S)
        except _NO_REPLICA as error:
            raise ApiError(503, f"no decode replica answers ({type(error).__name__})", kind="server_error") from error
        return {"status": "ok"}

    @api.get("/metrics")
    async def metrics(self) -> Response:
        """Prometheus text."""
        try:
            told = self._replicas.broadcast("load")
            loads = await told.results_async(timeout_s=_LOAD_WITHIN_S, return_exceptions=True)
        except _NO_REPLICA:  # what was counted here is worth telling all the same
            loads = []
        self._metrics.load([load for load in loads if not isinstance(load, BaseException)])
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The one model that is served."""
        return {"object": "list", "data": [self._card()]}

    @api.get("/v1/models/{model}")
    async def model(self, model: str) -> dict[str, Any]:
        """Its card."""
        self._check_model(model)
        return self._card()

    @api.post(
        "/v1/completions",
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": CompletionRequest.model_json_schema()}},
            }
        },
    )
    async def completions(self, http: Request) -> Response:
        """Complete a prompt, or fill the hole between a prompt and a suffix."""
        deadline = time.monotonic() + self._timeout_s
        try:
            async with asyncio.timeout(self._timeout_s):
                asked = parse_request(await _body(http))
                self._check_model(asked.model)
                choices = self._choices(asked)
                if asked.stream:
                    events = self._events(asked, choices, deadline)
                    # What is refused before the first event still has its own status.
                    body = _joined(await anext(events), events)
                    return StreamingResponse(body, media_type="text/event-stream", headers=_STREAM_HEADERS)
                await self._fill(choices, asked)
        except TimeoutError:
            self._metrics.failed(408)
            raise _late(self._timeout_s) from None
        except RequestError as error:
            self._metrics.failed(400)
            raise ApiError.of(error) from error
        except ApiError as error:
            self._metrics.failed(error.status)
            raise
        bodies = [choice_body(c.index, c.echo + c.text.text, c.finish_reason) for c in choices]
        return JSONResponse(completion_body(completion_id(), self._model, bodies, self._usage(choices)))

    def _card(self) -> dict[str, Any]:
        return {"id": self._model, "object": "model", "created": self._created, "owned_by": "dllm"}

    def _check_model(self, model: str) -> None:
        if model != self._model:
            message = f"the model {model!r} does not exist; this endpoint serves {self._model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def _choices(self, asked: CompletionRequest) -> list[_Choice]:
        """N rows for each prompt, refused here if one cannot be decoded."""
        suffix = tuple(self._tokenizer.encode(asked.suffix)) if asked.suffix else ()
        rows = asked.rows
        begun, choices = time.monotonic(), []
        for index, (prompt, seed) in enumerate(zip(rows, asked.seeds(len(rows)), strict=True)):
            ids = tuple(self._tokenizer.encode(prompt)) if isinstance(prompt, str) else tuple(prompt)
            self._check_room(len(ids), len(suffix))
            config = asked.decode_config(self._decode, self._context - len(ids) - len(suffix))
            request = DecodeRequest(prompt=ids, config=config, suffix=suffix, seed=seed)
            request.check(self._tokenizer.vocab_size, self._context)
            echo = (prompt if isinstance(prompt, str) else self._tokenizer.decode(ids)) if asked.echo else ""
            choices.append(_Choice(index, request, TextStream(self._tokenizer, asked.stops), echo, begun))
        return choices

    def _check_room(self, prompt: int, suffix: int) -> None:
        """Refuse what leaves no position open: no other max_tokens would help."""
        if prompt + suffix >= self._context:
            problem = f"prompt ({prompt}) + suffix ({suffix}) + 1 exceed the context of {self._context} tokens"
            raise RequestError("suffix" if suffix > prompt else "prompt", problem, remedy="shorten it")

    async def _fill(self, choices: list[_Choice], asked: CompletionRequest) -> None:
        """Decode all choices to their end; the first that fails ends the others."""

        async def follow(choice: _Choice) -> None:
            async for _ in self._pieces(choice, whole=not asked.stops):
                pass
            self._count(choice)

        tasks = [asyncio.create_task(follow(choice)) for choice in choices]
        try:
            await asyncio.gather(*tasks)
        except (RayError, RayServeException) as error:
            raise _explained(error) from error
        finally:
            for task in tasks:
                task.cancel()

    async def _pieces(self, choice: _Choice, *, whole: bool) -> AsyncGenerator[str, None]:
        """New text as it is committed, or `whole` at its end; a stop string ends it.

        A dead replica is tried again elsewhere. The text is the same there, and `choice.text` knows how much of it
        was given, so only what lies behind that follows.
        """
        for attempt in range(_TRIES):
            try:
                async with contextlib.aclosing(self._progress(choice.request, whole=whole)) as told:
                    async for progress in told:
                        yield choice.take(progress)
                        if choice.text.stopped:
                            return
                return
            except RayTaskError:  # the replica lives and says no
                raise
            except RayError:
                if attempt == _TRIES - 1:
                    raise
                await asyncio.sleep(0.1 * 4**attempt)

    async def _progress(self, request: DecodeRequest, *, whole: bool) -> AsyncGenerator[Progress, None]:
        """A replica's progress with one row, or its end alone, which costs one message. Leaving early frees the row."""
        if whole:
            answer = self._replicas.generate.remote(request)
            try:
                yield await answer
            finally:
                answer.cancel()
            return
        answers = self._replicas.options(stream=True).stream.remote(request)
        try:
            async for progress in answers:
                yield progress
        finally:
            answers.cancel()

    async def _events(
        self, asked: CompletionRequest, choices: list[_Choice], deadline: float
    ) -> AsyncGenerator[bytes, None]:
        """Server-sent events of all choices as they come. A failure before the first is raised, later ones are told."""
        answer_id, begun = completion_id(), False
        inbox: asyncio.Queue[tuple[_Choice, str | Exception, bool]] = asyncio.Queue()

        async def follow(choice: _Choice) -> None:
            try:
                if choice.echo:
                    inbox.put_nowait((choice, choice.echo, False))
                async for piece in self._pieces(choice, whole=False):
                    if piece:
                        inbox.put_nowait((choice, piece, False))
                inbox.put_nowait((choice, "", True))
            except Exception as error:  # noqa: BLE001 (handed to the client as an error event)
                inbox.put_nowait((choice, error, True))

        tasks = [asyncio.create_task(follow(choice)) for choice in choices]
        try:
            open_choices = len(choices)
            while open_choices:
                left = deadline - time.monotonic()
                try:
                    choice, piece, ended = await asyncio.wait_for(inbox.get(), min(_PING_EVERY_S, left))
                except TimeoutError:
                    if left <= _PING_EVERY_S:
                        raise _late(self._timeout_s) from None
                    yield b": ping\n\n"
                    begun = True
                    continue
                if isinstance(piece, Exception):
                    raise _explained(piece) from piece
                reason = choice.finish_reason if ended else None
                yield _event(completion_body(answer_id, self._model, [choice_body(choice.index, piece, reason)]))
                begun = True
                if ended:
                    open_choices -= 1
                    self._count(choice)
            if asked.stream_options is not None and asked.stream_options.include_usage:
                yield _event(completion_body(answer_id, self._model, [], self._usage(choices)))
            yield b"data: [DONE]\n\n"
        except ApiError as error:
            if not begun:
                raise
            self._metrics.failed(error.status)
            yield _event(error.body)
        finally:
            for task in tasks:
                task.cancel()

    def _count(self, choice: _Choice) -> None:
        progress, request = choice.progress, choice.request
        assert progress is not None
        self._metrics.finished(
            reason=choice.finish_reason or "stop",
            prompt=len(request.prompt) + len(request.suffix),
            tokens=progress.num_committed,
            calls=progress.num_calls,
            canvas=request.config.max_tokens,
            seconds=time.monotonic() - choice.begun,
            first=choice.first,
        )

    def _usage(self, choices: list[_Choice]) -> dict[str, Any]:
        done = [choice.progress for choice in choices if choice.progress is not None]
        prompt = sum(len(choice.request.prompt) + len(choice.request.suffix) for choice in choices)
        committed = sum(progress.num_committed for progress in done)
        calls = sum(progress.num_calls for progress in done)
        config = choices[0].request.config
        return {
            "prompt_tokens": prompt,
            "completion_tokens": committed,
            "total_tokens": prompt + committed,
            "diffusion": {
                "num_calls": calls,
                "tokens_per_call": round(committed / calls, 4) if calls else 0,
                "canvas_tokens": sum(choice.request.config.max_tokens for choice in choices),
                "committed_tokens": committed,
                "cache": config.cache,
                "steps_per_block": config.steps_per_block,
                "block_length": config.block_length,
                "policy": config.policy.model_dump(mode="json"),
            },
        }
