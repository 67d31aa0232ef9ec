"""DecodeRequest and DecodeState: one row on its way from masks to tokens.

`is_final` is the one truth about progress; the model's attention pattern decides in what blocks it is made:

| pattern | blocks | a call reads | what can no longer change |
|---|---|---|---|
| full | the request's, counted from the canvas's first position | the whole row | nothing |
| block_causal | the model's, counted from the row's first position | up to the block's end | the blocks before it |
| causal | single positions | all before the position | all that was read |

A row whose noise replaces tokens is ancestral: a call draws all of its open positions anew, a step nearer to t = 0, and
what they hold at 0, after `steps` calls, becomes final at once.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dllm_core.decoding.config import DecodeConfig
from dllm_core.errors import RequestError
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.seeding import Doubles, Floats, Ints, Purpose, uniforms, uniforms64

FinishReason = Literal["stop", "length"]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class DecodeRequest:
    """prompt + `config.max_tokens` open positions + suffix, as token ids.

    A row with an empty suffix ends at its first end token; a hole before a suffix is filled whole, without one.
    """

    prompt: tuple[int, ...]
    config: DecodeConfig
    suffix: tuple[int, ...] = ()
    seed: int = 0

    @property
    def length(self) -> int:
        """Positions of the row."""
        return len(self.prompt) + self.config.max_tokens + len(self.suffix)

    def check(self, vocab_size: int, context_length: int) -> None:
        """Refuse what cannot be decoded: too long, or ids outside the vocabulary."""
        if self.length > context_length:
            problem = (
                f"prompt ({len(self.prompt)}) + max_tokens ({self.config.max_tokens}) + suffix "
                f"({len(self.suffix)}) exceed the context of {context_length} tokens"
            )
            raise RequestError("max_tokens", problem, remedy="shorten the prompt or ask for fewer tokens")
        for place, ids in (("prompt", self.prompt), ("suffix", self.suffix)):
            if any(not 0 <= i < vocab_size for i in ids):
                raise RequestError(place, f"token ids must be in [0, {vocab_size})")


@dataclass
class DecodeState:
    """A row of the engine's table. canvas int64 [L]; is_final, is_closed bool [L].

    is_final: holds its last token (prompt and suffix from the start). is_closed: behind a committed end token, no
    longer of interest. num_calls: denoiser calls this row took part in (NFE). slot: where its keys and values are kept.
    """

    request: DecodeRequest
    pattern: AttentionPattern
    is_ancestral: bool
    canvas: Ints
    is_final: Bools
    is_closed: Bools
    committed_at: Ints  # the call that committed each position; 0 for prompt, suffix and open ones
    num_calls: int = 0
    calls_in_block: int = 0
    block_start: int = 0
    finish_reason: FinishReason | None = None
    slot: int | None = None
    _first_open: int = field(init=False, default=0)

    @classmethod
    def start(
        cls, request: DecodeRequest, prior: Ints, pattern: AttentionPattern = FULL, is_ancestral: bool = False
    ) -> "DecodeState":
        """The row before its first call; prior int64 [max_tokens] is the noise process at t = 1."""
        head, tail = len(request.prompt), len(request.suffix)
        canvas = np.concatenate([np.array(request.prompt, np.int64), prior, np.array(request.suffix, np.int64)])
        is_final = np.ones(len(canvas), dtype=bool)
        is_final[head : len(canvas) - tail] = False
        blank = np.zeros(len(canvas), dtype=bool)
        never = np.zeros(len(canvas), np.int64)
        return cls(request, pattern, is_ancestral, canvas, is_final, blank, never, block_start=head)

    @property
    def canvas_stop(self) -> int:
        """End of the open region: where the suffix begins."""
        return len(self.canvas) - len(self.request.suffix)

    @property
    def is_open(self) -> Bools:
        """Positions still to be filled [L]."""
        return ~(self.is_final | self.is_closed)

    @property
    def block(self) -> slice:
        """The current block, or what of it is canvas."""
        if self.is_ancestral:
            return slice(self.block_start, self.canvas_stop)
        if self.pattern.kind == "full":
            first, length = len(self.request.prompt), self.request.config.block_length
        else:
            first, length = 0, self.pattern.block_length or 1
        stop = first + ((self.block_start - first) // length + 1) * length
        return slice(self.block_start, min(stop, self.canvas_stop))

    @property
    def read_stop(self) -> int:
        """A call reads the positions [0, read_stop); under `full` the suffix too."""
        return len(self.canvas) if self.pattern.kind == "full" else self.block.stop

    @property
    def settled_stop(self) -> int:
        """The keys and values that a call computes at [0, settled_stop) are those of every later call."""
        if self.pattern.kind == "full":
            return 0
        length = self.pattern.block_length
        return self.read_stop if length is None else self.block_start // length * length

    def input_ids(self, mask_id: int) -> Ints:
        """What a call reads [read_stop]; for autoregression the token before each, the mask where there is none."""
        if self.pattern.kind != "causal":
            return self.canvas[: self.read_stop]
        before: Ints = np.concatenate([[mask_id], self.canvas[: self.read_stop - 1]])
        return before

    def open_in_block(self) -> Ints:
        """Open positions of the current block, ascending [n]."""
        return self.block_start + np.flatnonzero(self.is_open[self.block])

    def uniforms(self, positions: Ints) -> Floats:
        """One uniform for each position [n], a pure function of the request's seed, this call and the position."""
        return uniforms(self.request.seed, Purpose.DECODE, self.num_calls, positions, 1)[:, 0]

    @property
    def times(self) -> tuple[float, float]:
        """(s, t): the step of the reverse process that an ancestral row's next call takes, from t = 1 to s = 0."""
        steps = self.request.config.steps
        return (steps - self.num_calls - 1) / steps, (steps - self.num_calls) / steps

    def fine_uniforms(self, positions: Ints) -> Doubles:
        """Like `uniforms`, on a grid fine enough for the rare jumps of a short step over a large vocabulary."""
        return uniforms64(self.request.seed, Purpose.DECODE, self.num_calls, positions, 1)[:, 0]

    def commit(self, positions: Ints, tokens: Ints, confidence: Floats, eos_id: int) -> Ints:
        """Take a call's verdict on the block's open positions [n]; returns the positions that became final."""
        self.num_calls += 1
        self.calls_in_block += 1
        if self.is_ancestral:
            self.canvas[positions] = tokens
            chosen = np.full(len(positions), self.calls_in_block == self.request.config.steps)
        else:
            chosen = self._chosen(confidence)
        committed: Ints = positions[chosen]
        self.canvas[committed] = tokens[chosen]
        self.is_final[committed] = True
        self.committed_at[committed] = self.num_calls
        self._close_behind_end(eos_id)
        self._advance(eos_id)
        return committed

    def _chosen(self, confidence: Floats) -> Bools:
        """The policy's choice, of which the steps left demand a quota."""
        config, number = self.request.config, len(confidence)
        quota = -(-number // max(1, config.steps_per_block - self.calls_in_block + 1))
        return config.policy.choose(confidence, np.ones(number, dtype=bool), quota)

    def _close_behind_end(self, eos_id: int) -> None:
        """Nothing behind the first committed end token will be read, so nothing there is decoded."""
        if self.request.suffix:
            return
        head = len(self.request.prompt)
        ends = head + np.flatnonzero((self.canvas[head:] == eos_id) & self.is_final[head:])
        if len(ends):
            self.is_closed[ends[0] + 1 :] = True

    def _advance(self, eos_id: int) -> None:
        while self.finish_reason is None and not self.is_open[self.block].any():
            if not self.is_open.any():
                self.finish_reason = "stop" if eos_id in self.answer_with_end() else "length"
                return
            self.block_start = self.block.stop
            self.calls_in_block = 0

    def answer_with_end(self) -> list[int]:
        """Filled tokens from the canvas's first position up to the first that is open, an end token included."""
        head = len(self.request.prompt)
        waiting = np.flatnonzero(~self.is_final[head : self.canvas_stop] | self.is_closed[head : self.canvas_stop])
        stop = head + int(waiting[0]) if len(waiting) else self.canvas_stop
        return [int(token) for token in self.canvas[head:stop]]

    def answer(self, eos_id: int) -> list[int]:
        """The answer's tokens so far: committed, contiguous, without the end token. Never takes a token back."""
        tokens = self.answer_with_end()
        return tokens[: tokens.index(eos_id)] if eos_id in tokens and not self.request.suffix else tokens
