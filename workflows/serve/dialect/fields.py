"""What every decoding route's request has: sampling, streaming, and how the canvas is filled.

| effort | means |
|---|---|
| instant | `unmask: threshold` at 0.3; of replaced tokens a quarter of the recipe's steps |
| low | `unmask: threshold` at 0.6; half of its steps |
| medium | as the run's recipe says |
| high | one position a call, the surest; twice its steps |
"""

import json
import secrets
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.schema import json_object_regex, schema_regex
from dllm_core.errors import ConfigError, RequestError
from dllm_core.seeding import Purpose, words
from workflows.serve.config import Limits
from workflows.serve.dialect.body import depth

Effort = Literal["instant", "low", "medium", "high"]
_OPTIONS = {
    "threshold": ("threshold", "editing"),
    "factor": ("factor",),
    "eta": ("remasking",),
    "edit_threshold": ("editing",),
}
_PLAIN = {"cache": "cache", "steps": "steps", "cfg_scale": "guidance", "grow_by": "grow_by"}
_THRESHOLD_OF = {"instant": 0.3, "low": 0.6}
_STEPS_OF = {"instant": 0.25, "low": 0.5, "medium": 1.0, "high": 2.0}


class Part(BaseModel):
    """Of a request: nothing unknown, nothing converted, no NaN."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=True)


class StreamOptions(Part):
    """How a stream ends."""

    include_usage: bool = False


class DiffusionOptions(Part):
    """What is ours: how the canvas is filled. None means: as the run's recipe says."""

    unmask: (
        Literal["threshold", "factor", "low_confidence", "margin", "entropy", "random"]
        | Literal["ancestral", "remasking", "editing"]
        | None
    ) = None
    threshold: float | None = None
    factor: float | None = None
    eta: float | None = None
    edit_threshold: float | None = None
    cache: Literal["none", "prefix", "dual"] | None = None
    block_length: int | None = None
    steps_per_block: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    grow_by: int | None = None
    effort: Effort | None = None
    regex: str | None = None
    frames: Literal["whole", "changes"] = "whole"


class JsonSchema(Part):
    """OpenAI's `response_format.json_schema`; `strict` changes nothing: a schema is always kept."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = None


class ResponseFormat(Part):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class DecodingFields(Part):
    """Body of a route that decodes."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=10)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int = Field(1, ge=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stream: bool = False
    stream_options: StreamOptions | None = None
    diffusing: bool = False
    reasoning_effort: Effort | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    diffusion: DiffusionOptions = DiffusionOptions()

    @property
    def wanted_tokens(self) -> int | None:
        """The most that the answer may have; None: as the recipe says."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives are told beside each token's log-probability; None: not even that."""
        return None

    @property
    def names(self) -> dict[str, str]:
        """What the engine calls otherwise than the body: a refusal is to name what the client has sent."""
        return {"constraint": "response_format" if self.diffusion.regex is None else "diffusion.regex"}

    @property
    def num_rows(self) -> int:
        """How many rows are decoded; known before anything is encoded."""
        return self.n

    @property
    def is_streamed(self) -> bool:
        """Whether the answer comes as events."""
        return self.stream or self.diffusing

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self, limits: Limits) -> None:
        """Refuse what is beyond the endpoint's limits, and what would be passed over."""
        if self.n > limits.choices:
            raise RequestError("n", f"must be at most {limits.choices}", self.n)
        if self.diffusing and self.wanted_logprobs is not None:
            raise RequestError("logprobs", "are not told in frames", remedy="stream=true instead of diffusing")
        if self.stream_options is not None and not self.is_streamed:
            raise RequestError("stream_options", "is for stream=true", remedy="leave it out")
        format_ = self.response_format
        if format_ is not None and format_.json_schema is not None and format_.type != "json_schema":
            raise RequestError("response_format.json_schema", "is for type=json_schema", format_.type)
        if self.diffusion.frames != "whole" and not self.diffusing:
            raise RequestError("diffusion.frames", "is for diffusing=true", self.diffusion.frames)
        if len(self.stops) > limits.stops or any(not 1 <= len(stop) <= limits.stop_chars for stop in self.stops):
            raise RequestError("stop", f"at most {limits.stops} strings of 1 to {limits.stop_chars} characters")
        for name in ("steps", "steps_per_block"):
            value = getattr(self.diffusion, name)
            if value is not None and value > limits.steps:
                raise RequestError(f"diffusion.{name}", f"must be at most {limits.steps}", value)

    def constraint(self, limits: Limits) -> str | None:
        """The regular expression that all of the answer must match."""
        regex, format_ = self.diffusion.regex, self.response_format or ResponseFormat()
        if regex is not None and format_.type != "text":
            raise RequestError("diffusion.regex", "is another form of response_format", remedy="give one of them")
        if regex is not None:
            if len(regex) > limits.schema_bytes:
                raise RequestError("diffusion.regex", f"is longer than {limits.schema_bytes} characters")
            return regex
        if format_.type == "text":
            return None
        if format_.type == "json_object":
            return json_object_regex()
        return _regex_of(format_, limits)

    def decode_config(self, base: DecodeConfig, room: int) -> DecodeConfig:
        """The decoding that is asked for. A default of max_tokens that does not fit `room` is cut to it."""
        values = base.model_dump()
        values["max_tokens"] = self.wanted_tokens or max(1, min(base.max_tokens, room))
        for name in ("temperature", "top_p"):
            if getattr(self, name) is not None:
                values[name] = getattr(self, name)
        ours = self.diffusion
        if ours.block_length is not None:  # first: an effort may follow it
            values["block_length"] = ours.block_length
            values["steps_per_block"] = min(values["steps_per_block"], ours.block_length)
        _take_effort(values, ours.effort or self.reasoning_effort)
        if ours.unmask is not None and values["policy"]["type"] != ours.unmask:
            values["policy"] = {"type": ours.unmask}
        for name, kinds in _OPTIONS.items():
            value = getattr(ours, name)
            if value is not None:
                if values["policy"]["type"] not in kinds:
                    raise RequestError(f"diffusion.{name}", f"is for unmask={' or '.join(kinds)}", value)
                values["policy"] = {**values["policy"], name: value}
        for name, field in _PLAIN.items():
            if getattr(ours, name) is not None:
                values[field] = getattr(ours, name)
        values["refresh_every"] = values["refresh_every"] if values["cache"] != "none" else None
        if ours.steps_per_block is not None:
            values["steps_per_block"] = ours.steps_per_block
        try:
            return DecodeConfig.checked(values)
        except ConfigError as error:
            fields = {**{name: f"policy.{name}" for name in _OPTIONS}, **_PLAIN}
            named = {field: f"diffusion.{name}" for name, field in fields.items()}
            kept = error.place if error.place in {"temperature", "top_p", "max_tokens"} else f"diffusion.{error.place}"
            raise RequestError(named.get(error.place, kept), error.problem, error.value, error.remedy) from None

    def seeds(self, count: int) -> list[int]:
        """Choice 0 takes the seed itself; choice i a Philox word of (seed, i), so it does not depend on the others."""
        seed = secrets.randbits(63) if self.seed is None else self.seed % (1 << 64)
        derived = words(seed, Purpose.DECODE, (1 << 24) - 1, list(range(count)), 2)
        return [seed, *(int(low) | int(high) << 32 for low, high in derived[1:])]


def _take_effort(values: dict[str, Any], effort: Effort | None) -> None:
    if effort is None:
        return
    values["steps"] = max(1, round(values["steps"] * _STEPS_OF[effort]))
    if effort in _THRESHOLD_OF:
        values["policy"] = {"type": "threshold", "threshold": _THRESHOLD_OF[effort]}
    elif effort == "high":
        values["policy"] = {"type": "low_confidence"}
        values["steps_per_block"] = values["block_length"]


def _regex_of(asked: ResponseFormat, limits: Limits) -> str:
    place = "response_format.json_schema"
    if asked.json_schema is None:
        raise RequestError(place, "missing: response_format.type asks for it")
    schema = asked.json_schema.schema_
    text = json.dumps(schema)
    if len(text) > limits.schema_bytes:
        raise RequestError(place, f"is larger than {limits.schema_bytes} bytes", len(text))
    if depth(schema) > limits.schema_depth:
        raise RequestError(place, f"is nested deeper than {limits.schema_depth}")
    try:
        return schema_regex(text)
    except RequestError as error:
        raise RequestError(place, error.problem, error.value, error.remedy) from None
