"""Engine: continuous batching of decoding rows, for every objective that decodes.

A tick is: admit waiting rows -> one denoiser call -> each row's verdict.
Rows enter and leave between ticks only. A tick is bounded by the positions that it takes through the denoiser, not by
requests: rows that do not fit wait for the next one, which they come first in. No row's tokens depend on that.
"""

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.decoding.answer import Answer, RowUpdate, answer_of
from dllm_core.decoding.automaton import AutomatonCache
from dllm_core.decoding.config import MAX_ROWS, NO_SUFFIX, decoding_pattern, is_ancestral, no_decoder
from dllm_core.decoding.constraint import check_keepable, is_possible
from dllm_core.decoding.forward import padded_length, passes_of
from dllm_core.decoding.request import Request
from dllm_core.decoding.state import DecodeState
from dllm_core.decoding.step import propose
from dllm_core.decoding.text import Decodes, TextStream
from dllm_core.errors import RequestError
from dllm_core.model.cache import KeyValueStore
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.model.recorder import Recorder
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.process import NoiseProcess
from dllm_core.seeding import Bools, Ints, Purpose, uniforms, uniforms64


class Engine:
    """Decodes rows together. Not thread-safe: one owner adds, steps and cancels."""

    def __init__(
        self,
        bundle: ModelBundle,
        device: str = "cpu",
        max_batch_tokens: int = 4096,
        *,
        dtype: str | None = None,
        denoiser: Denoiser | None = None,
        keeps_keys: bool = True,
        compiles: bool = False,
    ) -> None:
        """Over a bundle's denoiser and noise process. Raises ConfigError where there is no decoder for it.

        denoiser: the bundle's own where it is open already, else it is read onto `device`, to compute in `dtype`.
        compiles: on a GPU, for who decodes for long, steps over kept keys once they are compiled, which takes a minute.
        """
        said = bundle.manifest
        problem = no_decoder(said.objective, said.process, bundle.config.model)
        if problem is not None:
            raise problem
        self._set(
            denoiser or bundle.denoiser(device, dtype),
            bundle.process,
            max_batch_tokens,
            pattern=decoding_pattern(said.objective, said.block_length),
            is_ancestral=is_ancestral(said.objective, said.process),
            keeps_keys=keeps_keys,
            compiles=compiles,
            tokenizer=bundle.tokenizer(),
        )

    @classmethod
    def over(cls, denoiser: Denoiser, process: NoiseProcess, max_batch_tokens: int = 4096, **options: Any) -> "Engine":
        """An engine over a denoiser that no bundle holds. options: those of `_set`."""
        engine = cls.__new__(cls)
        engine._set(denoiser, process, max_batch_tokens, **options)
        return engine

    def _set(
        self,
        denoiser: Denoiser,
        process: NoiseProcess,
        max_batch_tokens: int = 4096,
        max_rows: int = MAX_ROWS,
        *,
        pattern: AttentionPattern = FULL,
        is_ancestral: bool = False,
        keeps_keys: bool = True,
        compiles: bool = False,
        tokenizer: Decodes | None = None,
    ) -> None:
        """max_batch_tokens: positions of a tick; max_rows: rows in the batch, each with room for its keys and values.

        pattern: whom a position sees, as the denoiser was trained: `full`, `block_causal` or `causal`.
        is_ancestral: run the noise backwards over the whole canvas, as noise that replaces tokens asks; under `full`.
        keeps_keys: keep keys and values of what is settled, wherever something settles: that changes speed, no token;
        without it, a `decode.cache` that a request asks for is left out. tokenizer: what stop strings are found by.
        """
        self._denoiser, self._process, self._pattern = denoiser, process, pattern
        self._is_ancestral, self._tokenizer = is_ancestral, tokenizer
        self._max_batch_tokens, self._max_rows = max_batch_tokens, max_rows
        self._keeps_keys = keeps_keys and (pattern.kind == "full" or denoiser.config.model.can_keep(pattern))
        if self._keeps_keys:
            Recorder.attach(denoiser, compiles=compiles)
        self._store: KeyValueStore | None = None  # made when a row wants it
        self._waiting: deque[tuple[int, DecodeState]] = deque()
        self._active: dict[int, DecodeState] = {}
        self._streams: dict[int, TextStream] = {}  # of rows with stop strings
        self._served: dict[int, int] = {}  # the tick that each active row last took part in
        self._automata = AutomatonCache(getattr(tokenizer, "token_bytes", lambda: None))
        self._next_row = self._tick = 0
        self.fill = 0.0  # share of its room, rows or positions, that the last tick took; 1 where a row was left out

    @property
    def denoiser(self) -> Denoiser:
        """The denoiser that it decodes with."""
        return self._denoiser

    @property
    def is_ancestral(self) -> bool:
        """Whether it runs noise that replaces tokens backwards, and no position is ever a mask."""
        return self._is_ancestral

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

    def add(self, request: Request) -> int:
        """Queue a row; its id. Raises RequestError if it can never be decoded."""
        config = self._denoiser.config
        request.check(config.vocab_size, self.context_length)
        self._check_kind(request)
        region, is_open = self._region(request)
        state = DecodeState.start(
            request,
            region,
            self._pattern,
            is_open=is_open,
            is_ancestral=self._is_ancestral,
            is_shifted=config.model.shifted and self._pattern.kind != "causal",
            mask_id=config.mask_id,
        )
        if request.constraint is not None:
            state.automaton = self._automata.get(request.constraint)
            if not is_possible(state.automaton, state, config.eos_id):
                problem = f"no answer of at most {request.region_length} tokens matches it with what is given"
                raise RequestError("constraint", problem, request.constraint)
        row, self._next_row = self._next_row, self._next_row + 1
        if request.stop:
            assert self._tokenizer is not None
            self._streams[row] = TextStream(self._tokenizer, request.stop)
        self._waiting.append((row, state))
        return row

    @property
    def automata(self) -> AutomatonCache:
        """What `add` needs of constraints. Any thread may put one there, so that no tick waits for it."""
        return self._automata

    def _region(self, request: Request) -> tuple[Ints, Bools]:
        """What stands between prompt and suffix at first, and what of it is open [n]."""
        mask_id, begin = self._denoiser.config.mask_id, len(request.prompt)
        given = np.full(self._canvas_length(request), -1)
        if request.middle is not None:
            given[: request.region_length] = request.region
        # v is the second word of call 0; the draws of that call take the first.
        positions = begin + np.arange(len(given))
        v = uniforms64(request.seed, Purpose.DECODE, 0, positions, 2)[:, 1] if self._is_ancestral else None
        if request.strength is None:
            masks = np.full(len(given), mask_id)
            return np.where(given < 0, masks if v is None else self._process.prior(masks, v), given), given < 0
        u = uniforms(request.seed, Purpose.EDIT, 0, positions, 1)[:, 0]
        t = np.full(len(given), request.strength, np.float32)
        noised: Ints = self._process.corrupt(given[None], t[None], u[None], None if v is None else v[None])[0]
        edited = request.is_edited
        noised = np.where(edited, noised, given)
        if self._is_ancestral:
            return noised, edited
        is_open = edited & (noised == mask_id)
        is_open[np.where(edited, u, -1).argmax()] = True  # something is to change
        return np.where(is_open, mask_id, noised), is_open

    def _canvas_length(self, request: Request) -> int:
        """Positions between prompt and suffix: `max_tokens`, or what a growing canvas begins with, or those of
        `middle`; of a model of blocks up to the last one's end, which it was trained to see.
        """
        config = request.config
        if self._pattern.block_length is not None:
            stop = len(request.prompt) + request.region_length
            stop = min(-(-stop // self._pattern.block_length) * self._pattern.block_length, self.context_length)
            return stop - len(request.prompt)
        grows = config.grows_by and request.middle is None and not request.suffix and not self._is_ancestral
        if not grows or self._pattern.kind != "full":
            return request.region_length
        return min(config.grows_by, config.max_tokens)

    def cancel(self, row: int) -> None:
        """Forget a row; its place is free at the next tick. A finished or unknown row is no error."""
        if row in self._active:
            self._leave(row)
        self._streams.pop(row, None)
        self._waiting = deque(item for item in self._waiting if item[0] != row)

    def step(self) -> list[RowUpdate]:
        """One tick; empty if there is nothing to do. Finished rows (`state.finish_reason`) have left the batch."""
        self._admit()
        if not self._active:
            return []
        self._tick += 1
        due = self._due()
        states = [self._active[row] for row in due]
        proposals = propose(self._denoiser, self._process, states, self._store)
        updates = []
        for row, state, proposal in zip(due, states, proposals, strict=True):
            self._served[row] = self._tick
            if proposal is None:
                state.fail()
                updates.append(RowUpdate.failed(row, state))
            else:
                verdict = (proposal.positions, proposal.tokens, proposal.score)
                committed = state.commit(*verdict, self.eos_id, self._survival)
                updates.append(RowUpdate.of(row, state, proposal, committed))
                if row in self._streams:
                    self._stop_at_string(row, state)
            if state.finish_reason is not None:
                self._leave(row)
        return updates

    def _due(self) -> list[int]:
        """The rows of this tick: those that have waited longest first, while their positions stay in the budget."""
        due: list[int] = []
        taken = 0
        for row in sorted(self._active, key=lambda row: (self._served.get(row, 0), row)):
            taken += (width := self._width(self._active[row]))
            if due and taken > self._max_batch_tokens:
                break
            self._active[row].num_positions += width
            due.append(row)
        self.fill = 1.0 if self._waiting else min(1.0, max(len(due) / self._max_rows, taken / self._max_batch_tokens))
        return sorted(due)

    def _width(self, state: DecodeState) -> int:
        """Positions that the row's next call takes through the denoiser."""
        return sum(one.width for one in passes_of(state, self._store))

    def _stop_at_string(self, row: int, state: DecodeState) -> None:
        """End the row where a stop string stands in what is committed and can no longer change."""
        stream = self._streams[row]
        stream.push(state.answer(self.eos_id), last=state.finish_reason is not None)
        if stream.stopped:
            state.finish_reason = "stop"
        state.text = stream.text

    def generate(self, requests: Sequence[Request]) -> list[Answer]:
        """Decode requests to their end, in the order given; where one is refused, none."""
        if self._active or self._waiting:
            raise RequestError("generate", "the engine is busy", remedy="use add and step")
        answers: dict[int, Answer] = {}
        with self.left_empty():
            rows = {self.add(request): i for i, request in enumerate(requests)}
            while updates := self.step():
                for update in updates:
                    if update.state.finish_reason is not None:
                        answers[rows[update.row]] = answer_of(update.state, self.eos_id)
        return [answers[i] for i in range(len(requests))]

    @contextlib.contextmanager
    def left_empty(self) -> Iterator[None]:
        """No row is left when the block ends, with a refusal or Ctrl-C neither: the next caller's would meet it."""
        try:
            yield
        finally:
            for row in [*self._active, *dict(self._waiting)]:
                self.cancel(row)

    def _survival(self, t: float) -> float:
        """alpha(t) of masks; of other noise nobody asks."""
        assert isinstance(self._process, AbsorbingProcess)
        return float(self._process.schedule.alpha(np.float64(t)))

    def _admit(self) -> None:
        """First come, first served, while the next tick has room for all."""
        taken = sum(self._width(state) for state in self._active.values()) if self._waiting else 0
        while self._waiting and len(self._active) < self._max_rows:
            row, state = self._waiting[0]
            taken += padded_length(state.read_stop) * state.num_passes
            if self._active and taken > self._max_batch_tokens:
                return
            self._active[row] = state
            self._waiting.popleft()
            if self._keeps_keys and (self._pattern.kind != "full" or state.request.config.cache != "none"):
                if self._store is None:
                    weight = self._denoiser.embed.weight
                    self._store = KeyValueStore(self._denoiser.config.model, device=weight.device, dtype=weight.dtype)
                capacity = max(len(state.canvas), state.request.length)
                state.slots = tuple(self._store.take(capacity) for _ in range(state.num_passes))

    def _leave(self, row: int) -> None:
        state = self._active.pop(row)
        self._served.pop(row, None)
        self._streams.pop(row, None)
        if self._store is not None:
            for slot in state.slots:
                self._store.release(slot, is_spoilt=state.finish_reason == "error")

    def _check_kind(self, request: Request) -> None:
        """Refuse what this kind of model has no meaning for."""
        kind = self._pattern.kind
        if request.stop and self._tokenizer is None:
            raise RequestError("stop", "needs a tokenizer, which this engine has not", list(request.stop))
        if request.config.guidance and (kind == "causal" or self._is_ancestral):
            what = "reads from left to right" if kind == "causal" else "has tokens for noise"
            raise RequestError("guidance", f"needs masks, and the model {what}", request.config.guidance, "leave it 0")
        if request.constraint is not None:
            check_keepable(request, is_ancestral=self._is_ancestral)
        if kind == "full":
            return
        if request.reads_behind_holes or request.strength is not None:
            remedy = "leave it out, or take a model with objective.type=diffusion"
            raise RequestError("suffix" if request.suffix else "middle", NO_SUFFIX, remedy=remedy)
        trained, asked = self._pattern.block_length, request.config.block_length
        if trained is not None and asked != trained:
            raise RequestError("block_length", f"must be {trained}, in which the model was trained", asked)
