"""POST /v1/chat/completions: the turns of a conversation, and the assistant's next."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from dllm_core.errors import RequestError
from workflows.serve.config import Limits
from workflows.serve.dialect.fields import DecodingFields, Part
from workflows.serve.dialect.rows import Row, ServedModel, of_prompt


class TextPart(Part):
    """A piece of a message's content; text is all that the model reads."""

    type: Literal["text"]
    text: str


class Message(Part):
    """A turn. `developer` is OpenAI's newer name of `system`; `name` is not shown to the model.

    The others are what an answer's message may hold, which clients send back as it came; only nothing may be in them.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    tool_calls: None = None
    function_call: None = None

    @field_validator("refusal", "annotations", "audio", "tool_calls", "function_call", mode="before")
    @classmethod
    def _nothing(cls, value: Any) -> None:
        if value not in (None, "", [], {}):
            raise PydanticCustomError("unsupported", "is not supported: leave it out")

    @property
    def text(self) -> str:
        """All of its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def marker(self) -> str:
        """The role that the tokenizer has a marker for."""
        return "system" if self.role == "developer" else self.role


class ChatRequest(DecodingFields):
    """Body of POST /v1/chat/completions."""

    id_prefix: ClassVar[str] = "chatcmpl"
    object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def wanted_tokens(self) -> int | None:
        """`max_completion_tokens`, or `max_tokens` as it was called before."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def names(self) -> dict[str, str]:
        """Its prompt are messages; of the two names of their answer's length the one that counts."""
        length = {} if self.max_completion_tokens is None else {"max_tokens": "max_completion_tokens"}
        return {**super().names, "prompt": "messages", **length}

    @property
    def wanted_logprobs(self) -> int | None:
        """`top_logprobs`, where `logprobs` asks for any."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self, limits: Limits) -> None:
        """Beside what is refused everywhere: alternatives of what is not told."""
        super().check(limits)
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs", "needs logprobs=true", self.top_logprobs)

    def rows(self, model: ServedModel) -> list[Row]:
        """The same conversation n times."""
        tokenizer = model.tokenizer
        if not model.has_turns:
            problem = f"the model {model.name!r} knows no turns: its tokenizer has no markers of them"
            raise RequestError("messages", problem, remedy="ask /v1/completions, or train with tokenizer.chat")
        ids: list[int] = []
        for message in self.messages:
            ids += [tokenizer.role_id(message.marker), *tokenizer.encode(message.text), tokenizer.end_of_turn_id]
        ids.append(tokenizer.role_id("assistant"))
        constraint = self.constraint(model.limits)
        requests = of_prompt(self, model, tuple(ids), (), self.seeds(self.n), constraint)
        return [Row(request, end_id=tokenizer.end_of_turn_id) for request in requests]

    def choice(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """One choice of an answer."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": finish_reason}

    def piece(self, index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """The next of its pieces in a stream."""
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Whose turn it is."""
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def told(self, entries: list[dict[str, Any]], offsets: list[int]) -> dict[str, Any]:
        """Log-probabilities of tokens."""
        return {"content": entries, "refusal": None}
