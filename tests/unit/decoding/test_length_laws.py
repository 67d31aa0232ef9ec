"""What a search for a hole's length finds, held against languages whose answers are known.

`Oracle` is the exact denoiser of a first-order language: p(token | all that is seen), by sums forward and backward.
What stands here of likelihoods comes from listing every text, apart from it.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draws, in_long
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import EOS, MASK, PAD, PROCESS

from dllm_core.decoding.config import AnyPolicy, DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.lengths import infill
from dllm_core.decoding.request import OpenHole, Request, with_holes
from dllm_core.decoding.unmask import LowConfidencePolicy, ThresholdPolicy

FIRST = 3  # ids below are mask, end and padding
LOWEST = 1e-300


class Oracle:
    """Texts whose first word is any, each other one drawn from a row of `moves` [W W]. moves is positive everywhere."""

    device = torch.device("cpu")

    def __init__(self, moves: np.ndarray, context_length: int = 96) -> None:
        self.moves, self.words = moves, len(moves)
        self.config = SimpleNamespace(
            model=SimpleNamespace(time_conditioning=False, shifted=False),
            vocab_size=FIRST + self.words,
            context_length=context_length,
            mask_id=MASK,
            eos_id=EOS,
            pad_id=PAD,
        )

    def laws(self, ids: np.ndarray) -> np.ndarray:
        """Of each position of one row [L W]."""
        fits = np.where((ids == MASK)[:, None], 1.0, np.arange(self.words) + FIRST == ids[:, None])
        before, behind = np.ones_like(fits), np.ones_like(fits)
        for i in range(1, len(ids)):
            before[i] = (before[i - 1] * fits[i - 1]) @ self.moves
            before[i] /= before[i].sum()
        for i in range(len(ids) - 2, -1, -1):
            behind[i] = self.moves @ (behind[i + 1] * fits[i + 1])
            behind[i] /= behind[i].sum()
        laws = before * fits * behind
        return laws / laws.sum(1, keepdims=True)

    def __call__(self, ids: torch.Tensor, is_real: torch.Tensor, read: torch.Tensor, **_: object) -> torch.Tensor:
        logits = np.full((len(read), FIRST + self.words), np.log(LOWEST))
        laws = [self.laws(row[real]) for row, real in zip(ids.numpy(), is_real.numpy(), strict=True)]
        of_read = [laws[at // ids.shape[1]][at % ids.shape[1]] for at in read.tolist()]  # padding stands at the end
        logits[:, FIRST:] = np.log(np.stack(of_read).clip(LOWEST))
        return torch.from_numpy(logits)


def engine_of(moves: np.ndarray) -> Engine:
    return Engine.over(Oracle(moves), PROCESS, max_batch_tokens=1 << 16)


def asked(
    prompt: tuple[int, ...],
    suffix: tuple[int, ...],
    policy: AnyPolicy,
    block_length: int = 64,
    calls: int | None = None,
) -> Request:
    steps = block_length if calls is None else calls
    return Request(prompt, DecodeConfig(policy=policy, block_length=block_length, steps_per_block=steps), suffix)


def counting(words: int, slips: float) -> np.ndarray:
    """Each word follows the one before it in a circle; with a chance of `slips` any word does."""
    moves = np.full((words, words), slips / words)
    moves[np.arange(words), (np.arange(words) + 1) % words] += 1 - slips
    return moves


@pytest.mark.parametrize("right", [1, 13, 38, *in_long(2, 5, 23, 37)])
@pytest.mark.parametrize("policy", [LowConfidencePolicy(), ThresholdPolicy(threshold=0.9)], ids=["one", "threshold"])
@pytest.mark.parametrize("block_length", [4, 64])
def test_where_one_length_is_right_it_is_found(right, policy, block_length):
    """Words count on in a circle of 48. At any other length there is a slip somewhere, nobody knows where: of a hole of
    n a text has a chance of 1 / (n + 1), so that the mean over the tokens is ever surer the longer the hole is.
    """
    prompt, suffix = (FIRST, FIRST + 1), tuple(FIRST + (2 + right + i) % 48 for i in range(3))
    found = infill(engine_of(counting(48, 1e-4)), asked(prompt, suffix, policy, block_length), [OpenHole(1, 40)])
    assert found.lengths == (right,)
    assert found.answer.tokens == [FIRST + 2 + i for i in range(right)]
    assert found.log_confidence == pytest.approx(0, abs=1e-2)


@pytest.mark.parametrize("right", [5, 23])
def test_where_every_word_has_two_spellings_it_is_found_too(right):
    """log 2 more a token at any length, so that no mean is near 0 and a sum would prefer the shortest."""
    moves = np.tile(counting(48, 1e-4), (2, 2)) / 2
    prompt, suffix = (FIRST, FIRST + 1), tuple(FIRST + (2 + right + i) % 48 for i in range(3))
    found = infill(engine_of(moves), asked(prompt, suffix, LowConfidencePolicy()), [OpenHole(1, 40)])
    assert found.lengths == (right,)
    assert found.log_confidence == pytest.approx(-np.log(2), abs=1e-2)


def test_two_holes_that_each_have_one_right_length_are_both_found():
    text = [FIRST + i for i in range(40)]
    for first, second in ((3, 11), (9, 4)):
        request = asked(tuple(text[:2]), tuple(text[5 + first + second : 8 + first + second]), LowConfidencePolicy())
        pieces = [OpenHole(1, 14), tuple(text[2 + first : 5 + first]), OpenHole(1, 14)]
        found = infill(engine_of(counting(48, 1e-4)), request, pieces)
        assert found.lengths == (first, second)


WORDS = 3
laws = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).dirichlet([0.3] * WORDS, WORDS) + 1e-3)
word = st.integers(FIRST, FIRST + WORDS - 1)
policies = st.one_of(st.just(LowConfidencePolicy()), st.floats(0.05, 1).map(lambda x: ThresholdPolicy(threshold=x)))


def log_likelihood(moves: np.ndarray, request: Request, answer: list[int]) -> float:
    """log p(answer | what stands around it, its length), every text of that length listed."""
    texts = np.array(list(itertools.product(range(FIRST, FIRST + WORDS), repeat=len(answer))))
    around = [
        np.broadcast_to(np.array(part, int), (len(texts), len(part))) for part in (request.prompt, request.suffix)
    ]
    whole = np.concatenate([around[0], texts, around[1]], axis=1) - FIRST
    weights = moves[whole[:, :-1], whole[:, 1:]].prod(1)
    return float(np.log(weights[(texts == answer).all(1)].sum() / weights.sum()))


def calls_of(engine: Engine, request: Request) -> list[np.ndarray]:
    """The confidences of each call."""
    engine.add(request)
    calls = []
    while updates := engine.step():
        calls.append(updates[0].confidence.astype(np.float64))
    return calls


@settings(max_examples=draws(60), deadline=None)
@given(
    moves=laws.map(lambda moves: moves / moves.sum(1, keepdims=True)),
    prompt=st.lists(word, max_size=2).map(tuple),
    suffix=st.lists(word, min_size=1, max_size=2).map(tuple),
    policy=policies,
    calls=st.integers(1, 6),
)
def test_a_score_is_the_likelihood_to_within_what_parallel_calls_leave_open_and_the_best_length_is_taken(
    moves, prompt, suffix, policy, calls
):
    """One token a call: the log-likelihood a token itself. Several: between Frechet's bounds of each call."""
    engine, request = engine_of(moves), asked(prompt, suffix, policy, 6, calls)
    found = infill(engine, request, [OpenHole(1, 6)])
    scores = {}
    for length in range(1, 7):
        given = with_holes(request, [OpenHole(1, 6)], (length,))
        sure = calls_of(engine, given)
        [answer] = engine.generate([given])
        true = log_likelihood(moves, given, answer.tokens)
        scores[length] = np.log(np.concatenate(sure)).mean()
        with np.errstate(divide="ignore"):
            low = sum(np.log(max(0.0, 1 - (1 - call).sum())) for call in sure)
        high = sum(np.log(call.min()) for call in sure)
        assert low - 1e-4 <= true <= high + 1e-4
        if len(sure) == length:
            assert scores[length] == pytest.approx(true / length, abs=1e-5)
    best = max(scores.values())
    assert found.log_confidence == pytest.approx(best, abs=1e-6)
    assert scores[found.lengths[0]] == pytest.approx(best, abs=1e-6)
