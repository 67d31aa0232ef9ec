"""Section `serve`: the endpoint's address, who may ask, its limits, and what the pipeline asks of it for show."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.decoding.config import DecodeConfig

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class Example(Frozen):
    """A completion, or an infill if there is a suffix."""

    prompt: str
    suffix: str | None = None
    max_tokens: int | None = Field(None, ge=1)


class Limits(Frozen):
    """Sizes beyond which a request is refused with a 4xx that names them."""

    body_bytes: int = Field(1 << 20, ge=1024)
    header_bytes: int = Field(16 << 10, ge=1024)
    json_depth: int = Field(64, ge=4)
    rows: int = Field(64, ge=1, description="prompts times choices of one request")
    choices: int = Field(8, ge=1, description="n")
    stops: int = Field(4, ge=0)
    stop_chars: int = Field(64, ge=1)
    steps: int = Field(4096, ge=1, description="denoiser calls that a request may ask for")
    schema_bytes: int = Field(64 << 10, ge=1, description="of a JSON schema or a regular expression")
    schema_depth: int = Field(16, ge=1)
    compile_seconds: float = Field(10, gt=0, description="to make an automaton of a schema or regular expression")


class ServeConfig(Frozen):
    """The endpoint. Loopback unless told otherwise; beyond it only with keys, or where `open` says so."""

    host: str = Field("127.0.0.1", min_length=1)
    port: int = Field(8000, ge=1, le=65535)
    keys_file: str | None = Field(None, description="a line `NAME sha256:HEX` for each key; read again when it changes")
    open: bool = Field(False, description="let everyone in who reaches the address")
    allow_origins: tuple[str, ...] = Field((), description="CORS: origins whose pages may ask; none by default")
    models: dict[str, str] = Field({}, description="other runs to serve beside the first: name -> run")
    models_file: str | None = Field(None, description="a YAML of more of them; read again when it changes")
    dtype: Literal["float32", "bfloat16"] | None = Field(None, description="to compute in; null: the weights' own")
    max_batch_tokens: int = Field(4096, ge=64, description="token positions in one denoiser call")
    max_queued_requests: int = Field(512, ge=1, description="rows that wait in a replica; more are answered 429")
    request_timeout_s: float = Field(120, gt=0, description="an answer not finished by then ends with error 408")
    tracing_ratio: float = Field(0, ge=0, le=1, description="share of requests that OpenTelemetry spans are kept of")
    tracing_exporter: str | None = Field(
        None, description="module:function that returns span processors; null: files beside Ray Serve's logs"
    )
    limits: Limits = Limits()
    examples: tuple[Example, ...] = ()

    @model_validator(mode="after")
    def _closed_to_others(self) -> Self:
        if self.host not in LOOPBACK and self.keys_file is None and not self.open:
            problem = "lets other machines in, and no key is asked of them"
            remedy = "serve.keys_file=FILE, or serve.open=true for everyone"
            raise FieldProblem("host", problem, self.host, remedy)
        return self


class ServedRun(Frozen):
    """A run whose bundle is served, and how its recipe decodes. digest: of the bundle that is meant; None: of any."""

    run: str
    decode: DecodeConfig = DecodeConfig()
    digest: str | None = None


class ServedModels(Frozen):
    """What a deployment's `user_config` holds."""

    models: dict[str, ServedRun]

    @classmethod
    def of(cls, values: dict[str, Any]) -> dict[str, ServedRun]:
        """By name. Raises ConfigError with the place of what is wrong."""
        return cls.checked({"models": values}).models
