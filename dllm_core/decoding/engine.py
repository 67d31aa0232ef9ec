"""Engine: continuous batching of decoding rows, for every objective that decodes.

A tick is: admit waiting rows -> one denoiser call -> each row's verdict.
Rows enter and leave between ticks only. The batch is bounded by token positions, not by requests.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.decoding.config import NO_SUFFIX, decoding_pattern, is_ancestral, no_decoder
from dllm_core.decoding.state import DecodeRequest, DecodeState, FinishReason
from dllm_core.decoding.step import padded_length, propose
from dllm_core.errors import RequestError
from dllm_core.model.cache import KeyValueStore
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.noise.process import NoiseProcess
from dllm_core.seeding import Floats, Ints, Purpose, uniforms64


@dataclass(frozen=True)
class RowUpdate:
    """What one call did to one row. `state` is live: copy what must outlive the next tick.

    committed int64 [n] and confidence [n]: positions that became final in this call, and how sure it was of them.
    """

    row: int
    state: DecodeState
    committed: Ints
    confidence: Floats


@dataclass(frozen=True)
class Answer:
    """A finished row. tokens: without the end token; num_calls: denoiser calls (NFE).

    num_committed counts the end token, which a call had to commit like any other, and nothing behind it.
    """

    tokens: list[int]
    finish_reason: FinishReason
    num_calls: int
    num_committed: int

    @property
    def tokens_per_call(self) -> float:
        """Delivered tokens per denoiser call: 1 is autoregressive speed."""
        return self.num_committed / self.num_calls


class Engine:
    """Decodes rows together. Not thread-safe: one owner adds, steps and cancels."""

    def __init__(
        self,
        denoiser: Denoiser,
        process: NoiseProcess,
        max_batch_tokens: int = 4096,
        max_rows: int = 64,
        *,
        pattern: AttentionPattern = FULL,
        is_ancestral: bool = False,
        keeps_keys: bool = True,
    ) -> None:
        """pattern: whom a position sees, as the denoiser was trained: `full`, `block_causal` or `causal`.

        is_ancestral: run the noise backwards over the whole canvas, as noise that replaces tokens asks; under `full`.
        keeps_keys: keep keys and values of what is settled, wherever something settles; changes speed, no token.
        """
        self._denoiser, self._process, self._pattern = denoiser, process, pattern
        self._is_ancestral = is_ancestral
        self._max_batch_tokens, self._max_rows = max_batch_tokens, max_rows
        self._store: KeyValueStore | None = None
        if keeps_keys and pattern.kind != "full":
            weight = denoiser.embed.weight
            self._store = KeyValueStore(denoiser.config.model, device=weight.device, dtype=weight.dtype)
        self._waiting: deque[tuple[int, DecodeState]] = deque()
        self._active: dict[int, DecodeState] = {}
        self._next_row = 0

    @classmethod
    def of(
        cls, bundle: ModelBundle, device: str = "cpu", max_batch_tokens: int = 4096, *, keeps_keys: bool = True
    ) -> "Engine":
        """An engine over a bundle's denoiser and noise process. Raises ConfigError where there is no decoder for it."""
        said = bundle.manifest
        problem = no_decoder(said.objective, said.process, bundle.config.model)
        if problem is not None:
            raise problem
        pattern = decoding_pattern(said.objective, said.block_length)
        return cls(
            bundle.denoiser(device),
            bundle.process,
            max_batch_tokens,
            pattern=pattern,
            is_ancestral=is_ancestral(said.objective, said.process),
            keeps_keys=keeps_keys,
        )

    @property
    def num_active(self) -> int:
        """Rows in the batch."""
        return len(self._active)

    @property
    def num_waiting(self) -> int:
        """Rows not yet admitted."""
        return len(self._waiting)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer."""
        return self._denoiser.config.eos_id

    @property
    def context_length(self) -> int:
        """Positions that a row may have."""
        return min(self._denoiser.config.context_length, self._max_batch_tokens)

    def add(self, request: DecodeRequest) -> int:
        """Queue a row; its id. Raises RequestError if it can never be decoded."""
        config = self._denoiser.config
        request.check(config.vocab_size, self.context_length)
        self._check_order(request)
        canvas: Ints = np.full(request.config.max_tokens, config.mask_id, np.int64)
        if self._is_ancestral:
            # The second word of call 0, whose first word its draws take.
            positions = len(request.prompt) + np.arange(len(canvas))
            canvas = self._process.prior(canvas, uniforms64(request.seed, Purpose.DECODE, 0, positions, 2)[:, 1])
        row, self._next_row = self._next_row, self._next_row + 1
        self._waiting.append((row, DecodeState.start(request, canvas, self._pattern, self._is_ancestral)))
        return row

    def cancel(self, row: int) -> None:
        """Forget a row; its place is free at the next tick. A finished or unknown row is no error."""
        if row in self._active:
            self._leave(row)
        self._waiting = deque(item for item in self._waiting if item[0] != row)

    def step(self) -> list[RowUpdate]:
        """One tick; empty if there is nothing to do. Finished rows (`state.finish_reason`) have left the batch."""
        self._admit()
        if not self._active:
            return []
        config = self._denoiser.config
        states = list(self._active.values())
        proposals = propose(self._denoiser, self._process, states, config.eos_id, config.pad_id, self._store)
        updates = []
        for (row, state), proposal in zip(list(self._active.items()), proposals, strict=True):
            committed = state.commit(proposal.positions, proposal.tokens, proposal.confidence, config.eos_id)
            sure = proposal.confidence[np.isin(proposal.positions, committed)]
            updates.append(RowUpdate(row, state, committed, sure))
            if state.finish_reason is not None:
                self._leave(row)
        return updates

    def generate(self, requests: Sequence[DecodeRequest]) -> list[Answer]:
        """Decode requests to their end, in the order given."""
        if self._active or self._waiting:
            raise RequestError("generate", "the engine is busy", remedy="use add and step")
        rows = {self.add(request): i for i, request in enumerate(requests)}
        answers: dict[int, Answer] = {}
        while updates := self.step():
            for update in updates:
                if update.state.finish_reason is not None:
                    answers[rows[update.row]] = answer_of(update.state, self.eos_id)
        return [answers[i] for i in range(len(requests))]

    def _admit(self) -> None:
        """First come, first served, while the padded batch stays within its budget."""
        taken = sum(padded_length(len(state.canvas)) for state in self._active.values())
        while self._waiting and len(self._active) < self._max_rows:
            row, state = self._waiting[0]
            taken += padded_length(len(state.canvas))
            if self._active and taken > self._max_batch_tokens:
                return
            self._active[row] = state
            self._waiting.popleft()
            if self._store is not None:
                state.slot = self._store.take(len(state.canvas))

    def _leave(self, row: int) -> None:
        state = self._active.pop(row)
        if self._store is not None and state.slot is not None:
            self._store.release(state.slot)

    def _check_order(self, request: DecodeRequest) -> None:
        """Refuse what a model that reads left to right was not trained for."""
        if self._pattern.kind == "full":
            return
        if request.suffix:
            remedy = "leave it out, or take a model with objective.type=diffusion"
            raise RequestError("suffix", NO_SUFFIX, remedy=remedy)
        trained, asked = self._pattern.block_length, request.config.block_length
        if trained is not None and asked != trained:
            raise RequestError("block_length", f"must be {trained}, in which the model was trained", asked)


def answer_of(state: DecodeState, eos_id: int) -> Answer:
    """The answer in a finished row."""
    assert state.finish_reason is not None
    return Answer(
        tokens=state.answer(eos_id),
        finish_reason=state.finish_reason,
        num_calls=state.num_calls,
        num_committed=len(state.answer_with_end()),
    )
