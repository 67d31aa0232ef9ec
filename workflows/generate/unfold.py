"""A decode as a sequence of frames: what every position holds after each denoiser call."""

from collections.abc import Iterator
from dataclasses import dataclass

from dllm_core.data.tokenizer import Tokenizer
from dllm_core.decoding.answer import Answer, answer_of
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.state import DecodeState


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
    begun = False
    while updates := engine.step():
        state = updates[0].state
        if not begun:
            yield _blank(tokenizer, request, state)
            begun = True
        answer = answer_of(state, engine.eos_id) if state.finish_reason is not None else None
        is_open = state.is_open
        shown = state.is_final & ~state.is_closed
        yield Frame(
            num_calls=state.num_calls,
            texts=[tokenizer.token_text(int(t)) if s else "" for t, s in zip(state.canvas, shown, strict=True)],
            is_open=is_open.tolist(),
            committed_at=state.committed_at.tolist(),
            first=len(request.prompt),
            stop=state.canvas_stop,
            answer=answer,
            commits=updates[0].commits,
        )


def _blank(tokenizer: Tokenizer, request: Request, state: DecodeState) -> Frame:
    head, stop, length = len(request.prompt), state.canvas_stop, len(state.canvas)
    given = state.is_given.tolist()
    return Frame(
        num_calls=0,
        texts=[
            tokenizer.token_text(int(t)) if is_given else "" for is_given, t in zip(given, state.canvas, strict=True)
        ],
        is_open=[not is_given for is_given in given],
        committed_at=[0] * length,
        first=head,
        stop=stop,
        answer=None,
        commits=[],
    )
