"""OpenAI's completions dialect: what a request may hold, what an answer and an error look like.

A parameter that we do not implement is refused by name unless it has its neutral value: silently ignoring
`presence_penalty` would be a wrong answer.
"""

import json
import math
import secrets
import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dllm_core.decoding.config import DecodeConfig
from dllm_core.errors import ConfigError, DllmError, RequestError
from dllm_core.seeding import Purpose, words

MAX_BODY_BYTES = 1 << 20
_MAX_DEPTH = 64
_MAX_ROWS = 64
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "logprobs": (None,),
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": (None, {}),
    "best_of": (1, None),
}


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


_OPTIONS = {"threshold": ("threshold", "editing"), "factor": ("factor",), "eta": ("remasking",)}


class StreamOptions(_Part):
    """How a stream ends."""

    include_usage: bool = False


class DiffusionOptions(_Part):
    """What is ours: how the canvas is filled. None means: as the run's recipe says."""

    unmask: (
        Literal["threshold", "factor", "low_confidence", "margin", "entropy", "random"]
        | Literal["ancestral", "remasking", "editing"]
        | None
    ) = None
    threshold: float | None = None
    factor: float | None = None
    eta: float | None = None
    cache: Literal["none", "prefix", "dual"] | None = None
    block_length: int | None = None
    steps_per_block: int | None = None
    steps: int | None = None


class CompletionRequest(_Part):
    """Body of POST /v1/completions."""

    model: str
    prompt: str | list[str] | list[int] | list[list[int]]
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1, le=8)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    echo: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    diffusion: DiffusionOptions = DiffusionOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings, at most 4 of 1-64 characters."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > 4 or any(not 1 <= len(stop) <= 64 for stop in stops):
            raise RequestError("stop", "at most 4 strings of 1 to 64 characters")
        return stops

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or many prompts, as text or token ids."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not prompt:
            raise RequestError("prompt", "is an empty list")
        if len(prompt) > _MAX_ROWS and not isinstance(prompt[0], int):
            raise RequestError("prompt", f"at most {_MAX_ROWS} prompts", len(prompt))
        return [prompt] if isinstance(prompt[0], int) else list(prompt)

    @property
    def rows(self) -> list[str | list[int]]:
        """Each prompt `n` times: what is decoded, at most 64 at once."""
        prompts = self.prompts
        if len(prompts) * self.n > _MAX_ROWS:
            problem = f"{len(prompts)} in prompt times n must be at most {_MAX_ROWS}"
            raise RequestError("n", problem, self.n, "ask for fewer choices or split the list in prompt")
        return [prompt for prompt in prompts for _ in range(self.n)]

    def decode_config(self, base: DecodeConfig, room: int) -> DecodeConfig:
        """The decoding that is asked for. A default of max_tokens that does not fit `room` is cut to it."""
        values = base.model_dump()
        values["max_tokens"] = self.max_tokens or max(1, min(base.max_tokens, room))
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        ours = self.diffusion
        if ours.unmask is not None and values["policy"]["type"] != ours.unmask:
            values["policy"] = {"type": ours.unmask}
        for name, kinds in _OPTIONS.items():
            value = getattr(ours, name)
            if value is not None:
                if values["policy"]["type"] not in kinds:
                    raise RequestError(f"diffusion.{name}", f"is for unmask={' or '.join(kinds)}", value)
                values["policy"] = {**values["policy"], name: value}
        if ours.cache is not None:
            values["cache"] = ours.cache
            values["refresh_every"] = values["refresh_every"] if ours.cache != "none" else None
        if ours.block_length is not None:
            values["block_length"] = ours.block_length
            values["steps_per_block"] = min(values["steps_per_block"], ours.block_length)
        if ours.steps_per_block is not None:
            values["steps_per_block"] = ours.steps_per_block
        if ours.steps is not None:
            values["steps"] = ours.steps
        try:
            return DecodeConfig.checked(values)
        except ConfigError as error:
            place = error.place if error.place in {"temperature", "top_p", "max_tokens"} else f"diffusion.{error.place}"
            raise RequestError(place, error.problem, error.value, error.remedy) from None

    def seeds(self, count: int) -> list[int]:
        """Choice 0 takes the seed itself; choice i a Philox word of (seed, i), so it does not depend on the others."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 64)
        derived = words(seed, Purpose.DECODE, (1 << 24) - 1, list(range(count)), 2)
        return [seed, *(int(low) | int(high) << 32 for low, high in derived[1:])]


def parse_request(body: bytes) -> CompletionRequest:
    """A checked request, or RequestError with the parameter at fault."""
    values = _parsed(body)
    for name, neutral in _NEUTRAL.items():
        value = values.pop(name, None)
        if not any(value == fine and type(value) is not bool for fine in neutral):
            raise RequestError(name, "is not supported", value, "leave it out")
    try:
        return CompletionRequest.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        location = [str(part) for part in first["loc"] if str(part).isidentifier()]
        known = [part for part in location if part not in {"str", "list", "int", "constrained"}]
        message = "unknown parameter" if first["type"] == "extra_forbidden" else first["msg"]
        raise RequestError(".".join(known) or "body", message[0].lower() + message[1:]) from None


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        text = body.decode("utf-8")
        depth = deepest = 0
        for char in text:  # an upper bound: brackets in strings count too, until it matters
            depth += (char in "[{") - (char in "]}")
            deepest = max(deepest, depth)
        if deepest > _MAX_DEPTH and _depth(json.loads(text)) > _MAX_DEPTH:
            raise RequestError("body", f"nested deeper than {_MAX_DEPTH}")
        values = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(values, ensure_ascii=False).encode("utf-8")  # a lone surrogate has no UTF-8
    except RequestError:
        raise
    except UnicodeError:
        raise RequestError("body", "holds text that is not Unicode (bad UTF-8 or a lone surrogate)") from None
    except (ValueError, RecursionError) as error:
        raise RequestError("body", f"is not JSON ({error})") from None
    if not isinstance(values, dict):
        raise RequestError("body", "must be a JSON object")
    return values


def _refuse_constant(name: str) -> float:
    raise RequestError("body", "holds a number that JSON does not have", name)


def _depth(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    return 1 + max(map(_depth, value), default=0) if isinstance(value, list) else 0


class ApiError(Exception):
    """An HTTP answer in OpenAI's error shape."""

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
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: DllmError) -> "ApiError":
        """400 with the parameter at fault, under the name that it has in a request; 500 if it is not the request's."""
        if not isinstance(error, RequestError):
            return cls(500, str(error), kind="server_error")
        if error.place in DiffusionOptions.model_fields:  # the engine knows no HTTP
            error = RequestError(f"diffusion.{error.place}", error.problem, error.value, error.remedy)
        code = "context_length_exceeded" if "exceed the context" in error.problem else None
        return cls(400, str(error), param=error.place, code=code)


def completion_id() -> str:
    """A fresh answer id."""
    return f"cmpl-{secrets.token_hex(12)}"


def completion_body(answer_id: str, model: str, choices: list[dict[str, Any]], usage: Any = None) -> dict[str, Any]:
    """An answer, or one chunk of a stream."""
    body = {"id": answer_id, "object": "text_completion", "created": math.floor(time.time()), "model": model}
    return {**body, "choices": choices, **({"usage": usage} if usage is not None else {})}


def choice_body(index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
    """One choice."""
    return {"text": text, "index": index, "logprobs": None, "finish_reason": finish_reason}
