"""Edge: what holds for every route. Who may ask, request ids, headers, errors in one shape, a log without prompts."""

import json
import logging
import re
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from dllm_core.errors import RequestError
from workflows.serve.config import Limits
from workflows.serve.dialect.errors import ApiError
from workflows.serve.keys import KeyRing

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_ROUTES = frozenset({"/health", "/metrics", "/"})  # the page holds nothing: what it asks needs a key
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_OWN_HEADERS = "authorization, content-type, x-request-id"
_METHODS = "GET, POST, OPTIONS"
_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]+")
_log = logging.getLogger("dllm.access")


@dataclass(frozen=True)
class EdgeSettings:
    """Whom a gateway lets in, and how much of a header. tells_ids: nobody before it does."""

    keys: KeyRing | None = None
    allow_origins: frozenset[str] = frozenset()
    limits: Limits = field(default_factory=Limits)
    tells_ids: bool = True


# One gateway a process: Ray Serve copies the application before the gateway knows its settings.
_settings = EdgeSettings()


def guard(settings: EdgeSettings) -> None:
    """What holds in this process from now on."""
    global _settings
    _settings = settings


class Edge:
    """ASGI middleware; a cancelled request passes through it untouched."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        asked_id = headers.get("x-request-id", "")
        request_id = asked_id if _REQUEST_ID.fullmatch(asked_id) else secrets.token_hex(8)
        began, status, is_begun, key = time.monotonic(), 500, False, None

        async def tell(message: Message) -> None:
            nonlocal status, is_begun
            if message["type"] == "http.response.start":
                status, is_begun = message["status"], True
                said = {name.lower() for name, _ in message["headers"]}
                own = {**_HEADERS, **self._cors(headers)}
                if _settings.tells_ids or request_id != asked_id:
                    own["X-Request-Id"] = request_id
                message["headers"] = [
                    *message["headers"],
                    *((n.encode(), v.encode()) for n, v in own.items() if n.lower().encode() not in said),
                ]
            await send(message)

        try:
            refusal, key = self._refusal(scope, headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                refusal = ApiError(403, "this origin may not ask")
                if self._cors(headers):
                    await Response(status_code=204)(scope, receive, tell)
                    return
            if refusal is not None:
                await JSONResponse(refusal.body, refusal.status, refusal.headers)(scope, receive, tell)
                return
            await self._app(scope, receive, tell)
        except Exception as error:
            if not is_begun:  # here, where it has its headers and its id yet
                told = ApiError(500, type(error).__name__, kind="server_error")
                await JSONResponse(told.body, told.status)(scope, receive, tell)
            raise
        finally:
            line = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
                "key": key,
            }
            _log.info(json.dumps(line))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[ApiError | None, str | None]:
        """Why a request is refused before its body is read, and the name of the key that it came with."""
        limit = _settings.limits.header_bytes
        if sum(len(name) + len(value) + 4 for name, value in scope["headers"]) > limit:
            return ApiError(431, f"the headers are larger than {limit} bytes"), None
        keys = _settings.keys
        if keys is None or scope["path"] in OPEN_ROUTES or scope["method"] == "OPTIONS":
            return None, None
        name = keys.name_of(headers.get("authorization"))
        if name is None:
            headers_ = {"WWW-Authenticate": "Bearer"}
            message = "no API key, or one that is not known: send it as `Authorization: Bearer KEY`"
            return ApiError(401, message, code="invalid_api_key", headers=headers_), None
        return None, name

    def _cors(self, headers: dict[str, str]) -> dict[str, str]:
        """Leave for an origin's pages, where it has any: clients send headers of their own (`x-stainless-os`)."""
        origin = headers.get("origin")
        if origin is None or origin not in _settings.allow_origins:
            return {}
        asked = headers.get("access-control-request-headers", "")
        return {
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": asked if _HEADER_NAMES.fullmatch(asked) else _OWN_HEADERS,
            "Access-Control-Expose-Headers": "x-request-id, retry-after",
            "Vary": "Origin, Access-Control-Request-Headers",
        }


def log_to_stderr() -> None:
    """One JSON line a request: no prompt, no answer, no key."""
    if not _log.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        _log.addHandler(handler)
        _log.setLevel(logging.INFO)
        _log.propagate = False


async def read_body(http: Request, limit: int) -> bytes:
    """The body of a JSON request, refused as soon as it is too large."""
    kind = http.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the body must be application/json, not {kind}")
    body = b""
    async for part in http.stream():
        body += part
        if len(body) > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes")
    return body


def answer_errors(api: FastAPI) -> None:
    """Every error in OpenAI's shape, FastAPI's and Starlette's own too; what nobody has foreseen, `Edge` tells."""

    async def api_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return JSONResponse(error.body, error.status, error.headers)

    async def request_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestError)
        return await api_error(request, ApiError.of(error))

    async def http_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        known = {404: f"there is no route {request.url.path}", 405: f"{request.method} is not allowed here"}
        message = known.get(error.status_code, str(error.detail))
        return JSONResponse(ApiError(error.status_code, message).body, error.status_code, error.headers)

    async def validation_error(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return JSONResponse(ApiError(400, str(error.errors()[0]["msg"])).body, 400)

    api.add_exception_handler(ApiError, api_error)
    api.add_exception_handler(RequestError, request_error)
    api.add_exception_handler(HTTPException, http_error)
    api.add_exception_handler(RequestValidationError, validation_error)
