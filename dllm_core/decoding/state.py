"""DecodeState: one row on its way from masks to tokens.

`is_final` is the one truth about progress; the model's attention pattern decides in what blocks it is made:

| pattern | blocks | a call reads | what can no longer change |
|---|---|---|---|
| full | the request's, counted from the canvas's first position | the whole row | nothing |
| block_causal | the model's, counted from the row's first position | up to the block's end | the blocks before it |
| causal | single positions | all before the position | all that was read |

Under `full` a request may ask for a cache: then only the first call of a block (and every `refresh_every`-th) computes
the whole row, the others a `Span` of it.

A row whose noise replaces tokens is ancestral: a call draws all of its open positions anew, a step nearer to t = 0, and
what they hold at 0, after `steps` calls, becomes final at once.

A position is open until it is final (holds its last token) or closed (stands behind the answer's end).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dllm_core.decoding.automaton import TokenAutomaton
from dllm_core.decoding.config import AnyRevisingPolicy
from dllm_core.decoding.request import Request
from dllm_core.decoding.revise import EditingPolicy, Moment
from dllm_core.decoding.unmask import AnyUnmaskPolicy
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.seeding import Bools, Floats, Ints, Purpose, uniforms

FinishReason = Literal["stop", "length", "error"]
Survival = Callable[[float], float]


@dataclass(frozen=True)
class Span:
    """The positions [begin, stop) of a row that a call computes. needs_keys: it reads those of the others as kept."""

    begin: int
    stop: int
    needs_keys: bool

    @property
    def width(self) -> int:
        """The number of positions."""
        return self.stop - self.begin


@dataclass
class DecodeState:
    """A row of the engine's table. canvas int64 [L]; is_final, is_closed bool [L].

    is_given: what the request gave; is_final: holds its last token (what was given from the start). is_closed: behind a
    committed end token, no longer of interest. num_calls: denoiser calls this row took part in (NFE); num_positions:
    what went through the denoiser for it, padding and guidance's blind pass included. slots: where the keys and values
    of its passes are kept, none if empty.
    """

    request: Request
    pattern: AttentionPattern
    is_ancestral: bool
    is_shifted: bool
    mask_id: int
    canvas: Ints
    is_given: Bools
    is_final: Bools
    is_closed: Bools
    committed_at: Ints  # the call that committed each position; 0 for prompt, suffix and open ones
    num_calls: int = 0
    num_positions: int = 0
    calls_in_block: int = 0
    step: int = 0  # of the current block's `steps_per_block`; some of them may need no call
    block_start: int = 0
    finish_reason: FinishReason | None = None
    slots: tuple[int, ...] = ()
    automaton: TokenAutomaton | None = None  # of a row with a constraint
    text: str | None = None  # of a row with stop strings: what stands before the first, as far as it is settled

    @classmethod
    def start(
        cls,
        request: Request,
        region: Ints,
        pattern: AttentionPattern = FULL,
        *,
        is_open: Bools | None = None,
        is_ancestral: bool = False,
        is_shifted: bool = False,
        mask_id: int = -1,
    ) -> "DecodeState":
        """The row before its first call; region int64 [n]: what stands between prompt and suffix.

        is_open [n]: what of it is to be filled, by default all. is_shifted: a position's token is told by the position
        before it. mask_id: what a policy that takes tokens back puts there.
        """
        head, tail = len(request.prompt), len(request.suffix)
        canvas = np.concatenate([np.array(request.prompt, np.int64), region, np.array(request.suffix, np.int64)])
        is_given = np.ones(len(canvas), dtype=bool)
        is_given[head : len(canvas) - tail] = False if is_open is None else ~is_open
        blank = np.zeros(len(canvas), dtype=bool)
        never = np.zeros(len(canvas), np.int64)
        kind = (pattern, is_ancestral, is_shifted, mask_id)
        state = cls(request, *kind, canvas, is_given, is_given.copy(), blank, never, block_start=head)
        state._skip_full_blocks()
        return state

    @property
    def canvas_stop(self) -> int:
        """End of the open region: where the suffix begins."""
        return len(self.canvas) - len(self.request.suffix)

    @property
    def answer_stop(self) -> int:
        """End of the answer so far. Under `block_causal` the canvas may go on to its last block's end, as trained."""
        return min(len(self.request.prompt) + self.request.region_length, self.canvas_stop)

    @property
    def num_passes(self) -> int:
        """Rows that it takes in a forward."""
        return 2 if self.request.config.guidance else 1

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
    def steps_in_block(self) -> int:
        """Steps that the current block has: `DecodeConfig.steps_of`, where others stand before it."""
        config, block = self.request.config, self.block
        is_first = block.start <= len(self.request.prompt) or self.pattern.kind != "full"
        return config.steps_per_block if is_first else config.steps_of(block.stop - block.start)

    @property
    def read_stop(self) -> int:
        """A call reads the positions [0, read_stop); under `full` the suffix too."""
        return len(self.canvas) if self.pattern.kind == "full" else self.block.stop

    def span(self, kept: int) -> Span:
        """What the next call computes, where so many positions' keys and values are kept."""
        if self.pattern.kind != "full":
            return Span(kept, self.read_stop, kept > 0)
        config, whole = self.request.config, Span(0, len(self.canvas), False)
        since = self.calls_in_block % (config.refresh_every or self.calls_in_block + 1)
        if not self.slots or not since:
            return whole
        begin = max(0, self.block_start - 1) if self.is_shifted else self.block_start
        return Span(begin, whole.stop if config.cache == "prefix" else self.block.stop, True)

    @property
    def settled_stop(self) -> int:
        """The keys and values that a call computes at [0, settled_stop) are those of every later call."""
        if self.pattern.kind == "full":
            return 0
        length = self.pattern.block_length
        return self.read_stop if length is None else self.block_start // length * length

    def input_ids(self, mask_id: int, span: Span, *, is_blind: bool = False) -> Ints:
        """What a call reads there; for autoregression the token before each, the mask where there is none.

        is_blind: masks where something was given.
        """
        if is_blind:
            seen: Ints = np.where(self.is_given, mask_id, self.canvas)[span.begin : span.stop]
            return seen
        if self.pattern.kind != "causal":
            return self.canvas[span.begin : span.stop]
        before: Ints = np.concatenate([[mask_id], self.canvas[: span.stop - 1]])[span.begin :]
        return before

    def open_in_block(self) -> Ints:
        """Open positions of the current block, ascending [n]."""
        return self.block_start + np.flatnonzero(self.is_open[self.block])

    @property
    def times(self) -> tuple[float, float]:
        """(s, t): the reverse process's step that an ancestral row takes next, from t = 1, or `strength`, to s = 0."""
        steps, begin = self.request.config.steps, self.request.strength or 1.0
        return begin * (steps - self.num_calls - 1) / steps, begin * (steps - self.num_calls) / steps

    def commit(self, positions: Ints, tokens: Ints, score: Floats, eos_id: int, survival: Survival) -> Ints:
        """Take a call's verdict on the block's open positions [n]; returns the positions that became final.

        score [n]: what the policy ranks positions by. survival: alpha(t) of the noise.
        """
        self.num_calls += 1
        self.calls_in_block += 1
        policy = self.request.config.policy
        if self.is_ancestral:
            self.canvas[positions] = tokens
            chosen = np.full(len(positions), self.calls_in_block == self.request.config.steps)
        elif self.pattern.kind == "causal":
            chosen = np.ones(len(positions), dtype=bool)  # no policy waits with a token, nor takes it back
        elif isinstance(policy, AnyRevisingPolicy):
            is_settled = self._revise(policy, positions, tokens, score, survival)
            chosen, tokens = np.full(len(positions), is_settled), self.canvas[positions]
        else:
            chosen = self._chosen(policy, positions, score)
        committed: Ints = positions[chosen]
        self.canvas[committed] = tokens[chosen]
        self.is_final[committed] = True
        self.committed_at[committed] = self.num_calls
        self._close(eos_id)
        self._advance(eos_id)
        return committed

    def _revise(
        self, policy: AnyRevisingPolicy, positions: Ints, tokens: Ints, confidence: Floats, survival: Survival
    ) -> bool:
        """Let the policy write into the block; whether it is settled."""
        config, held = self.request.config, self.canvas[positions]
        is_mask, steps = held == self.mask_id, self.steps_in_block
        if isinstance(policy, EditingPolicy) and is_mask.any():
            self._pass_over(int(is_mask.sum()))
        verdict = policy.revise(
            Moment(
                is_mask=is_mask,
                agrees=held == tokens,
                confidence=confidence,
                u=self._of_policy(policy, positions),
                step=self.step,
                steps=steps,
                quota=config.quota_of(int(is_mask.sum()), self.step, steps),
                alpha_t=survival(max(0.0, 1 - self.step / steps)),
                alpha_s=survival(max(0.0, 1 - (self.step + 1) / steps)),
            )
        )
        self.step += 1
        self.canvas[positions[verdict.fill]] = tokens[verdict.fill]
        self.canvas[positions[verdict.remask]] = self.mask_id
        return verdict.is_settled

    def _of_policy(self, policy: AnyUnmaskPolicy | AnyRevisingPolicy, positions: Ints) -> Floats:
        """Its uniforms [n]; of one that draws nothing 0, for a draw costs more than all else here."""
        if not policy.draws:
            return np.zeros(len(positions), np.float32)
        return uniforms(self.request.seed, Purpose.UNMASK, self.num_calls, positions, 1)[:, 0]

    def _chosen(self, policy: AnyUnmaskPolicy, positions: Ints, score: Floats) -> Bools:
        """The policy's choice, of which the steps left demand a quota."""
        self._pass_over(len(positions))
        quota = self.request.config.quota_of(len(positions), self.step, self.steps_in_block)
        self.step += 1
        return policy.choose(score, quota, self._of_policy(policy, positions))

    def _pass_over(self, number: int) -> None:
        """Pass over the steps that demand none of so many masks."""
        while not self.request.config.quota_of(number, self.step, self.steps_in_block):
            self.step += 1

    def _close(self, eos_id: int) -> None:
        """Nothing behind the first committed end token will be read, nor behind `max_tokens`.

        Where every position is seen, end tokens stand there at once (dInfer, arXiv:2510.08666). A block is shown whole
        in training, so in blocks what stands behind in the same one is decoded on while something before is open.
        """
        if not self.request.is_ended_by_model:
            return
        head, stop = self.request.open_end, self.answer_stop
        ends = np.flatnonzero((self.canvas[head:stop] == eos_id) & self.is_final[head:stop])
        if len(ends):
            stop = head + int(ends[0]) + 1
        if self.is_final[:stop].all():
            self.is_closed[stop:] = True
        elif len(ends) and self.pattern.kind == "full":
            self.canvas[stop:] = eos_id
            self.is_closed[stop:] = True
        elif stop <= self.block.stop:
            self.is_closed[self.block.stop :] = True

    def _advance(self, eos_id: int) -> None:
        """To the next block with something open; the canvas grows, or the row ends, where there is none."""
        self._skip_full_blocks()
        if self.is_open.any():
            return
        if eos_id in self.canvas[self.request.open_end : self.answer_stop]:
            self.finish_reason = "stop"
        elif self._grown():
            self._skip_full_blocks()
        else:
            self.finish_reason = "length"

    def _skip_full_blocks(self) -> None:
        while self.is_open.any() and not self.is_open[self.block].any():
            self.block_start = self.block.stop
            self.calls_in_block = self.step = 0

    def _grown(self) -> bool:
        """Add `grow_by` masks to a canvas that is full and holds no end; whether there was room for any."""
        config, length = self.request.config, len(self.canvas)
        more = min(config.grows_by, len(self.request.prompt) + config.max_tokens - length)
        if more <= 0 or not self.request.is_ended_by_model or self.request.middle is not None:
            return False
        self.block_start = length
        self.calls_in_block = self.step = 0
        self.canvas = np.pad(self.canvas, (0, more), constant_values=self.mask_id)
        for name in ("is_given", "is_final", "is_closed", "committed_at"):
            setattr(self, name, np.pad(getattr(self, name), (0, more)))
        return True

    def fail(self) -> None:
        """End the row without an answer: what the denoiser said of it is no number."""
        self.num_calls += 1
        self.finish_reason = "error"

    def answer_with_end(self) -> list[int]:
        """What stands between prompt and suffix, up to the first open position or the end token, that included."""
        head, stop = len(self.request.prompt), self.answer_stop
        waiting = np.flatnonzero(~self.is_final[head:stop] | self.is_closed[head:stop])
        stop = head + int(waiting[0]) if len(waiting) else stop
        return [int(token) for token in self.canvas[head:stop]]

    @property
    def num_committed(self) -> int:
        """Tokens of `answer_with_end` that calls made."""
        head = len(self.request.prompt)
        return int((~self.is_given[head : head + len(self.answer_with_end())]).sum())

    def answer(self, eos_id: int) -> list[int]:
        """The answer's tokens so far: committed, contiguous, without the end token. Never takes a token back."""
        tokens = self.answer_with_end()
        at = self.request.open_end - len(self.request.prompt)
        return tokens[: tokens.index(eos_id, at)] if eos_id in tokens[at:] else tokens
