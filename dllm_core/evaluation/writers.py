"""Writers: what goes on from a prompt, so that the text of any model is judged by the same lines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request

Tokens = Sequence[int]


@dataclass(frozen=True)
class Written:
    """tokens: without the end token; num_committed counts it; num_calls: denoiser calls."""

    tokens: list[int]
    num_committed: int
    num_calls: int


class Writer(Protocol):
    """Goes on from prompts. Prompt i is written on with seed + i, so its answer does not depend on the others."""

    def write(self, prompts: Sequence[Tokens], max_tokens: int | Sequence[int], *, seed: int) -> list[Written]:
        """One answer a prompt, in order, of at most `max_tokens` (one for all, or its own) tokens with its end."""


class EngineWriter:
    """A model as it is served."""

    def __init__(self, engine: Engine, config: DecodeConfig) -> None:
        self._engine, self._config = engine, config

    def write(self, prompts: Sequence[Tokens], max_tokens: int | Sequence[int], *, seed: int) -> list[Written]:
        """As `Writer.write`. Raises RequestError for a prompt that leaves too little room in the context."""
        requests = [
            Request(tuple(prompt), self._config.model_copy(update={"max_tokens": room}), seed=seed + i)
            for i, (prompt, room) in enumerate(zip(prompts, _rooms(prompts, max_tokens), strict=True))
        ]
        return [Written(a.tokens, a.num_committed, a.num_calls) for a in self._engine.generate(requests)]


def _rooms(prompts: Sequence[Tokens], max_tokens: int | Sequence[int]) -> Sequence[int]:
    return [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
