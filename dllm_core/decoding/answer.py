"""What decoding tells: RowUpdate, of one call and one row, and Answer, of a finished row."""

from dataclasses import dataclass, field

import numpy as np

from dllm_core.decoding.state import DecodeState, FinishReason
from dllm_core.decoding.step import Proposal
from dllm_core.seeding import Floats, Ints


@dataclass(frozen=True)
class RowUpdate:
    """What one call did to one row. `state` is live: copy what must outlive the next tick.

    committed int64 [n] and confidence [n]: positions that became final in this call, and how sure it was of what they
    hold, which may be a token that it would have replaced, had it been surer of another.
    best_tokens, best_log_probs [n k]: the likeliest there, as `Request.top_logprobs` asks.
    """

    row: int
    state: DecodeState
    committed: Ints
    confidence: Floats
    best_tokens: Ints
    best_log_probs: Floats

    @property
    def commits(self) -> list[tuple[int, int, float]]:
        """Position, token and confidence of each, as plain numbers."""
        tokens = self.state.canvas[self.committed].tolist()
        return list(zip(self.committed.tolist(), tokens, self.confidence.tolist(), strict=True))

    @classmethod
    def of(cls, row: int, state: DecodeState, proposal: Proposal, committed: Ints) -> "RowUpdate":
        """What became final of a proposal."""
        told = np.searchsorted(proposal.positions, committed)  # both rise
        is_proposed = proposal.tokens[told] == state.canvas[committed]
        sure = np.where(is_proposed, proposal.confidence[told], proposal.held[told])
        return cls(row, state, committed, sure, proposal.best_tokens[told], proposal.best_log_probs[told])

    @classmethod
    def failed(cls, row: int, state: DecodeState) -> "RowUpdate":
        """The update of a row that has failed: nothing became final."""
        none = (np.zeros(0, np.int64), np.zeros(0, np.float32))
        return cls(row, state, *none, none[0][:, None], none[1][:, None])


@dataclass(frozen=True)
class Answer:
    """A finished row. tokens: what stands between prompt and suffix, without the end token.

    finish_reason: `stop` at an end token or stop string, `length`, or `error`: the denoiser's output was no number.
    num_calls: denoiser calls (NFE); num_positions: what went through the denoiser in them. num_committed: tokens that
    calls made; it counts the end token, which a call had to commit like any other, and nothing behind it. text: where
    stop strings were asked for, what stands before the first.
    """

    tokens: list[int]
    finish_reason: FinishReason
    num_calls: int
    num_committed: int
    num_positions: int = field(default=0, compare=False)  # a cost like seconds: caches change it, and no token
    text: str | None = None

    @property
    def tokens_per_call(self) -> float:
        """Delivered tokens per denoiser call: 1 is autoregressive speed."""
        return self.num_committed / self.num_calls


def answer_of(state: DecodeState, eos_id: int) -> Answer:
    """The answer in a finished row."""
    assert state.finish_reason is not None
    return Answer(
        tokens=state.answer(eos_id),
        finish_reason=state.finish_reason,
        num_calls=state.num_calls,
        num_committed=state.num_committed,
        num_positions=state.num_positions,
        text=state.text,
    )
