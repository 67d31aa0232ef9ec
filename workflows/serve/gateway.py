"""Gateway: the routes. HTTP and text on one side, token ids and decode replicas on the other. Holds no weights."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Protocol, TypeVar

from fastapi import HTTPException, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from dllm_core.checkpoints.bundle_manifest import read_outline
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.config import MAX_ROWS
from dllm_core.errors import ConfigError, DllmError, RequestError
from workflows.serve.answer import Answering, explained
from workflows.serve.calls import scores_of, told_by_all
from workflows.serve.config import ServeConfig, ServedModels, ServedRun
from workflows.serve.dialect.body import parse_body
from workflows.serve.dialect.chat import ChatRequest
from workflows.serve.dialect.completions import CompletionRequest, FimRequest
from workflows.serve.dialect.errors import ApiError, late, unavailable
from workflows.serve.dialect.rows import Row, ServedModel
from workflows.serve.dialect.score import ScoreRequest
from workflows.serve.dialect.spans import EditRequest, InfillRequest
from workflows.serve.edge import Edge, EdgeSettings, answer_errors, guard, log_to_stderr, read_body
from workflows.serve.keys import KeyRing
from workflows.serve.metrics import Counted, GatewayMetrics
from workflows.serve.openapi import ERRORS, Api, takes
from workflows.serve.page import PAGE, PAGE_HEADERS
from workflows.serve.room import Room
from workflows.serve.routing import num_replicas

_LARGE = 16 << 10  # bytes of a body that take milliseconds to read
_STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}

Decoding = CompletionRequest | ChatRequest | InfillRequest | EditRequest
Asked = TypeVar("Asked", bound=Decoding | ScoreRequest)
Made = TypeVar("Made")

api = Api(
    title="dllm",
    description="A diffusion language model behind OpenAI's dialect, Mercury's frames, and routes for both sides.",
    redirect_slashes=False,
    docs_url=None,
    redoc_url=None,
)
answer_errors(api)
api.add_middleware(Edge)


class _Making(Protocol):
    """Where the body of a request is made something of."""

    def __call__(self, function: Callable[[], Made], /) -> Awaitable[Made]: ...


# Ray Serve copies the class below when it is decorated: what it calls must stand above it.
async def _here(function: Callable[[], Made], /) -> Made:
    return function()


def _rows(asked: Decoding, model: ServedModel) -> list[Row]:
    try:
        return asked.rows(model)
    except RequestError as error:
        raise ApiError.of(error, asked.names) from None


async def _joined(first: bytes, others: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    async with contextlib.aclosing(others):  # a client that leaves while it is slow to read ends them too
        yield first
        async for other in others:
            yield other


def _is_behind_a_proxy() -> bool:
    """Whether Ray Serve runs this: its proxy puts an id into each request, and into its answer."""
    try:
        serve.get_replica_context()
    except RayServeException:
        return False
    return True


@serve.deployment
@serve.ingress(api)
class Gateway:
    """The Ray Serve ingress. Its models come by `reconfigure`, {name: {run, decode}}.

    may_rest: no replica at all is well, while nobody asks. gateways: as many as there are of this class.
    """

    def __init__(
        self, replicas: DeploymentHandle, settings: dict[str, Any], may_rest: bool = False, gateways: int = 1
    ) -> None:
        self._settings, self._gateways = ServeConfig.checked(settings), gateways
        self._replicas, self._may_rest = replicas, may_rest
        self._models: dict[str, ServedModel] = {}
        self._said: dict[str, ServedRun] = {}
        self._metrics = GatewayMetrics()
        self._room = Room(MAX_ROWS + self._settings.max_queued_requests, num_replicas)
        keys = self._settings.keys_file
        ring = KeyRing(keys) if keys is not None else None
        origins, limits = frozenset(self._settings.allow_origins), self._settings.limits
        guard(EdgeSettings(ring, origins, limits, tells_ids=not _is_behind_a_proxy()))
        log_to_stderr()

    def reconfigure(self, models: dict[str, dict[str, Any]]) -> None:
        """Serve these models, the first as the default of the page, and no other."""
        runs = ServedModels.of(models)
        if not runs:
            raise ConfigError(
                "models", "none is said", remedy="args.models, or user_config of Gateway and DecodeReplica"
            )
        kept: dict[str, ServedModel] = {}
        for name, said in runs.items():
            if self._said.get(name) == said:
                kept[name] = self._models[name]
                continue
            bundle = read_outline(RunDir.at(said.run))  # weights of gigabytes would be fetched and hashed for nothing
            kept[name] = ServedModel.of(name, bundle, said.decode, self._settings.limits, int(time.time()))
        self._models, self._said = kept, runs

    @api.get("/", include_in_schema=False)
    async def page(self) -> Response:
        """The live page: a prompt, and the canvas as it is denoised."""
        return HTMLResponse(PAGE, headers=PAGE_HEADERS)

    @api.head("/health", include_in_schema=False)  # as load balancers ask
    @api.get("/health")
    async def health(self) -> dict[str, Any]:
        """200 if a decode replica runs its decoding loops (or is idle), 503 if none does. not_loaded: models, where a
        replica could not load some.
        """
        loads = await self._loads()
        well = [load for load in loads if not isinstance(load, BaseException)]
        if not well and (loads or not self._may_rest):
            reasons = ", ".join(sorted({type(load).__name__ for load in loads}))
            raise unavailable(f"no decode replica answers ({reasons or 'there is none'})")
        missing = sorted({name for load in well for name in load.get("not_loaded", ())})
        return {"status": "ok", "replicas": len(well), **({"not_loaded": missing} if missing else {})}

    @api.get("/metrics")
    async def metrics(self) -> Response:
        """Prometheus text, of all gateways."""
        # What was counted here is worth telling without the others too.
        loads, counted = await asyncio.gather(self._loads(), self._counted_elsewhere())
        self._metrics.load([load for load in loads if not isinstance(load, BaseException)])
        text = self._metrics.text(told for told in counted if not isinstance(told, BaseException))
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def counted(self) -> Counted:
        """What this gateway has counted, for another one's /metrics."""
        return self._metrics.counted()

    @api.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        """The models that are served, the first of them the default of the page."""
        return {"object": "list", "data": [model.card for model in self._models.values()]}

    @api.get("/v1/models/{model:path}", openapi_extra={"responses": ERRORS})  # a name may hold a slash
    async def model(self, model: str) -> dict[str, Any]:
        """One's card."""
        if not model:
            raise HTTPException(404)
        return self._model(model).card

    @api.post("/v1/completions", openapi_extra=takes(CompletionRequest))
    async def completions(self, http: Request) -> Response:
        """Complete a prompt, or fill the hole between a prompt and a suffix."""
        return await self._decoded(http, CompletionRequest)

    @api.post("/v1/chat/completions", openapi_extra=takes(ChatRequest))
    async def chat(self, http: Request) -> Response:
        """The assistant's next turn."""
        return await self._decoded(http, ChatRequest)

    @api.post("/v1/fim/completions", openapi_extra=takes(FimRequest))
    async def fim(self, http: Request) -> Response:
        """The middle between a prompt and a suffix."""
        return await self._decoded(http, FimRequest)

    @api.post("/v1/infill", openapi_extra=takes(InfillRequest))
    async def infill(self, http: Request) -> Response:
        """Any number of holes, filled together."""
        return await self._decoded(http, InfillRequest)

    @api.post("/v1/edit", openapi_extra=takes(EditRequest))
    async def edit(self, http: Request) -> Response:
        """Spans of a text, noised and denoised."""
        return await self._decoded(http, EditRequest)

    @api.post("/v1/score", openapi_extra=takes(ScoreRequest, is_streamed=False))
    async def score(self, http: Request) -> Response:
        """How likely texts are, with standard errors."""
        with self._counted():
            async with asyncio.timeout(self._settings.request_timeout_s):
                asked, model, made = await self._read(http, ScoreRequest)
                questions = await made(lambda: asked.questions(model))
                call = (model.name, model.digest, questions, asked.draws, asked.target_error, asked.seed)
                try:
                    scores, estimator = await scores_of(self._replicas, *call)
                except Exception as error:
                    raise explained(error) from error
                return JSONResponse(asked.answer(model, questions, scores, estimator))

    async def _decoded(self, http: Request, kind: type[Decoding]) -> Response:
        """Answer one request of a decoding route, whole or as a stream."""
        begun = time.monotonic()
        deadline = begun + self._settings.request_timeout_s
        with self._counted():
            async with asyncio.timeout(self._settings.request_timeout_s):
                asked, model, made = await self._read(http, kind)
                places = self._room.take(model.name, asked.num_rows)  # first, since it costs nothing
                try:
                    rows = await made(lambda: _rows(asked, model))
                    shared = (self._replicas, model, asked, rows, self._metrics, places, begun, deadline)
                    answering = Answering(*shared)
                    if not asked.is_streamed:
                        return JSONResponse(await answering.whole())
                    events = answering.events()
                    # What is refused before the first event still has its own status.
                    first = await anext(events)
                except BaseException:
                    places.end()
                    raise
                return StreamingResponse(
                    _joined(first, events), media_type="text/event-stream", headers=_STREAM_HEADERS
                )

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Errors as answers, all of them counted: also those that nobody has foreseen, which become a 500."""
        try:
            yield
        except (DllmError, ApiError, TimeoutError) as error:
            raise self._refused(error) from error
        except Exception:
            self._metrics.failed(500)
            raise

    async def _loads(self) -> list[Any]:
        """What each replica says of its rows, or what went wrong there."""
        return await told_by_all(self._replicas, "load")

    async def _counted_elsewhere(self) -> list[Any]:
        """What each gateway has counted, or what went wrong there."""
        if self._gateways == 1:
            return []
        here = serve.get_replica_context()
        return await told_by_all(serve.get_deployment_handle(here.deployment, here.app_name), "counted")

    async def _read(self, http: Request, kind: type[Asked]) -> tuple[Asked, ServedModel, _Making]:
        """A body, checked, the model that it asks for, and where to make more of it: a large one in a thread."""
        limits = self._settings.limits
        body = await read_body(http, limits.body_bytes)
        made: _Making = _here if len(body) <= _LARGE else asyncio.to_thread

        def read() -> tuple[Asked, ServedModel]:
            asked = parse_body(kind, body, limits)
            model = self._model(asked.model)
            asked.check(limits)
            return asked, model

        return *await made(read), made

    def _refused(self, error: Exception) -> ApiError:
        """Counted, and as the client is told."""
        told = late(self._settings.request_timeout_s) if isinstance(error, TimeoutError) else explained(error)
        self._metrics.failed(told.status)
        return told

    def _model(self, name: str) -> ServedModel:
        if name not in self._models:
            served = ", ".join(repr(known) for known in self._models)
            message = f"the model {name!r} does not exist; this endpoint serves {served}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return self._models[name]
