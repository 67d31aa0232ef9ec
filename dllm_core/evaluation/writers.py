"""Writers: models that go on from a prompt. Masked diffusion by the engine, autoregression token after token.

So that text and answers of both are judged by the same lines; what a call costs is counted alike.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.forward import padded_length
from dllm_core.decoding.request import Request
from dllm_core.model.pattern import CAUSAL
from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Floats, Purpose, seeds_of, uniforms

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
    """Masked diffusion as it is served."""

    def __init__(self, engine: Engine, config: DecodeConfig) -> None:
        self._engine, self._config = engine, config

    def write(self, prompts: Sequence[Tokens], max_tokens: int | Sequence[int], *, seed: int) -> list[Written]:
        """As `Writer.write`. Raises RequestError for a prompt that leaves too little room in the context."""
        requests = [
            Request(tuple(prompt), self._config.model_copy(update={"max_tokens": room}), seed=seed + i)
            for i, (prompt, room) in enumerate(zip(prompts, _rooms(prompts, max_tokens), strict=True))
        ]
        return [Written(a.tokens, a.num_committed, a.num_calls) for a in self._engine.generate(requests)]


class CausalWriter:
    """Autoregression: the likeliest token each time, or one drawn by inversion at a temperature.

    end_id: None for answers that have no end and take all `max_tokens`. never: ids that no answer holds, as the mask.
    The row is read anew for each token, without a cache: this measures, and does not serve.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        mask_id: int,
        device: torch.device,
        *,
        end_id: int | None,
        never: Collection[int],
        temperature: float = 0.0,
        batch_rows: int = 32,
    ) -> None:
        self._denoiser, self._mask_id, self._device, self._end_id = denoiser, mask_id, device, end_id
        self._never, self._temperature, self._batch_rows = sorted({*never, mask_id}), temperature, batch_rows

    def write(self, prompts: Sequence[Tokens], max_tokens: int | Sequence[int], *, seed: int) -> list[Written]:
        """As `Writer.write`: rows of one padded length go together, so that a row's own length decides its padding."""
        found: dict[int, Written] = {}
        rooms = _rooms(prompts, max_tokens)
        shapes = [(padded_length(len(prompt) + room), room) for prompt, room in zip(prompts, rooms, strict=True)]
        for length, room in sorted(set(shapes)):
            at = [i for i, own in enumerate(shapes) if own == (length, room)]
            for start in range(0, len(at), self._batch_rows):
                part = at[start : start + self._batch_rows]
                ids = self._written([prompts[i] for i in part], room, length, [seed + i for i in part])
                found.update(zip(part, map(self._cut, ids), strict=True))
        return [found[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def _written(self, prompts: Sequence[Tokens], size: int, length: int, seeds: list[int]) -> list[list[int]]:
        """All `size` tokens of each. ids[:, i] is the token before position i, the mask where there is none."""
        ids = torch.full((len(prompts), length + 1), self._mask_id)
        for row, prompt in zip(ids, prompts, strict=True):
            row[1 : 1 + len(prompt)] = torch.tensor(prompt, dtype=torch.int64)
        rows, heads = torch.arange(len(prompts)), torch.tensor([len(prompt) for prompt in prompts])
        draws = uniforms(seeds_of(seeds), Purpose.DECODE, 0, np.zeros(len(seeds)), size)
        is_open = torch.ones(len(prompts), dtype=torch.bool)
        for step in range(size):
            read = rows * length + heads + step
            shown = ids[:, :length].to(self._device)
            logits = self._denoiser(shown, read=read.to(self._device), pattern=CAUSAL).double().cpu()
            logits[:, self._never] = -torch.inf
            ids[rows, heads + step + 1] = self._chosen(logits, draws[:, step])
            is_open &= ids[rows, heads + step + 1] != self._end_id
            if not is_open.any():
                break
        return [row[1 + head : 1 + head + size].tolist() for row, head in zip(ids, heads.tolist(), strict=True)]

    def _chosen(self, logits: Tensor, draws: Floats) -> Tensor:
        """Tokens [n] of logits [n V], fp64, and uniforms [n]."""
        if not self._temperature:
            return logits.argmax(-1)
        cumulative = (logits / self._temperature).softmax(-1).cumsum(-1)
        target = torch.from_numpy(draws).double()[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)

    def _cut(self, tokens: list[int]) -> Written:
        if self._end_id in tokens:
            tokens = tokens[: tokens.index(self._end_id)]
            return Written(tokens, len(tokens) + 1, len(tokens) + 1)
        return Written(tokens, len(tokens), len(tokens))


def _rooms(prompts: Sequence[Tokens], max_tokens: int | Sequence[int]) -> Sequence[int]:
    return [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
