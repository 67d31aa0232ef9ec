"""ApiError: an HTTP answer in OpenAI's error shape, `{"error": {message, type, param, code}}`."""

from collections.abc import Mapping

from dllm_core.errors import DllmError, RequestError

_CONTEXT = "exceed the context"
# The engine knows no HTTP: its names of what a request holds, and a request's own; a route may have others.
_NAMES = {"constraint": "response_format", "guidance": "diffusion.cfg_scale"}
_OURS = {"block_length", "steps", "steps_per_block", "cache", "policy"}


class ApiError(Exception):
    """Refuses a request with a status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers or {}
        self.body: dict[str, dict[str, str | None]] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }

    @classmethod
    def of(cls, error: DllmError, names: Mapping[str, str] | None = None) -> "ApiError":
        """400 with the parameter at fault, under the name that it has in a request; 500 if it is not the request's.

        names: the route's, of what the engine calls otherwise.
        """
        if not isinstance(error, RequestError):
            return cls(500, str(error), kind="server_error")
        names = {**_NAMES, **(names or {})}
        place = f"diffusion.{error.place}" if error.place in _OURS else names.get(error.place, error.place)
        error = RequestError(place, error.problem, error.value, error.remedy)
        code = "context_length_exceeded" if _CONTEXT in error.problem else None
        return cls(400, str(error), param=error.place, code=code)


def busy() -> ApiError:
    """429: more rows wait than may."""
    headers = {"Retry-After": "1"}
    return ApiError(429, "all replicas are busy", kind="rate_limit_error", code="rate_limit_exceeded", headers=headers)


def late(timeout_s: float) -> ApiError:
    """408: the deadline has passed."""
    return ApiError(408, f"no answer within {timeout_s:g} s", kind="timeout_error", code="request_timeout")


def unavailable(message: str) -> ApiError:
    """503: nobody can answer now."""
    return ApiError(503, message, kind="server_error", headers={"Retry-After": "1"})
