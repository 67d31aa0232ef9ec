"""Section `serve`: the endpoint's address, its limits, and what the pipeline asks of it to show that it answers."""

from typing import Literal

from pydantic import Field

from dllm_core.config.base import Frozen


class Example(Frozen):
    """A completion, or an infill if there is a suffix."""

    prompt: str
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=1)


class ServeConfig(Frozen):
    """The endpoint. Loopback unless told otherwise: there is no authentication yet."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=1, le=65535)
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="to compute in; null: the weights' own")
    max_batch_tokens: int = Field(4096, ge=64, description="token positions in one denoiser call")
    max_queued_requests: int = Field(512, ge=1, description="rows that wait in a replica; more are answered 429")
    request_timeout_s: float = Field(120, gt=0, description="an answer not finished by then ends with error 408")
    examples: tuple[Example, ...] = ()
