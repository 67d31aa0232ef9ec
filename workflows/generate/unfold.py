"""A decode as a sequence of frames: what every position holds after each denoiser call."""

from collections.abc import Iterator
from dataclasses import dataclass

from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.answer import Answer, answer_of
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.state import DecodeState
from dllm_core.seeding import Bools


@dataclass(frozen=True)
class Frame:
    """After call `num_calls` (0: before the first). committed_at [L]: the call that filled a position, 0 for given
    and open ones; texts [L]: the tokens' texts, empty where open or behind the end. commits: position, token and
    confidence of what this call made final.
    """

    num_calls: int
    texts: list[str]
    is_open: list[bool]
    committed_at: list[int]
    first: int
    stop: int
    answer: Answer | None
    commits: list[tuple[int, int, float]]


def unfold(engine: Engine, tokenizer: Tokenizer, request: Request) -> Iterator[Frame]:
    """Frames from the empty canvas to the answer; the last one holds it."""
    engine.add(request)
    first, begun = len(request.prompt), False
    while updates := engine.step():
        state = updates[0].state
        if not begun:
            given, begun = state.is_given, True
            texts, nothing = _texts(tokenizer, state, given), [0] * len(given)
            yield Frame(0, texts, (~given).tolist(), nothing, first, state.canvas_stop, answer=None, commits=[])
        answer = answer_of(state, engine.eos_id) if state.finish_reason is not None else None
        shown = state.is_final & ~state.is_closed
        yield Frame(
            num_calls=state.num_calls,
            texts=_texts(tokenizer, state, shown),
            is_open=state.is_open.tolist(),
            committed_at=state.committed_at.tolist(),
            first=first,
            stop=state.canvas_stop,
            answer=answer,
            commits=updates[0].commits,
        )


def _texts(tokenizer: Tokenizer, state: DecodeState, shown: Bools) -> list[str]:
    return tokenizer.token_texts([int(token) if s else None for token, s in zip(state.canvas, shown, strict=True)])
