"""Fifty rows of every kind in one batch, coming and going: each gets the answer that it gets alone."""

import random
from dataclasses import replace

import pytest
from rows import EOS, PROCESS, VOCABULARY, new_denoiser

from dllm_core.decoding.answer import Answer, answer_of
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.revise import AncestralPolicy, EditingPolicy, RemaskingPolicy
from dllm_core.decoding.unmask import (
    EntropyPolicy,
    FactorPolicy,
    LowConfidencePolicy,
    MarginPolicy,
    RandomPolicy,
    ThresholdPolicy,
)
from dllm_core.model.denoiser import Denoiser

POLICIES = [
    *(LowConfidencePolicy(), MarginPolicy(), EntropyPolicy(), RandomPolicy(), FactorPolicy(), AncestralPolicy()),
    *(ThresholdPolicy(threshold=0.3), RemaskingPolicy(eta=0.4), EditingPolicy(threshold=0.3, edit_threshold=0.6)),
    LowConfidencePolicy(position_temperature=0.4),
]


class Letters:
    """Token i is the i-th letter."""

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(96 + i) for i in ids)

    def token_bytes(self) -> list[bytes | None]:
        return [None if i < 3 else chr(96 + i).encode() for i in range(VOCABULARY)]


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser()


def mixture(seed: int, number: int) -> list[Request]:
    """Rows that share nothing: length, block, steps, policy, cache, guidance, temperature, shape and constraint."""
    rng = random.Random(seed)
    rows = []
    for i in range(number):
        policy, block = POLICIES[i % len(POLICIES)], rng.randint(1, 12)
        config = DecodeConfig(
            policy=policy,
            block_length=block,
            steps_per_block=rng.randint(1, block),
            max_tokens=rng.randint(1, 24),
            cache=rng.choice(["none", "prefix", "dual"]),
            guidance=rng.choice([0.0, 0.0, 1.0]),
            temperature=rng.choice([0.0, 0.7, 1.3]),
            top_p=rng.choice([1.0, 0.8]),
            grow_by=rng.choice([None, 4]),
        )
        prompt = tuple(rng.randint(3, VOCABULARY - 1) for _ in range(rng.randint(0, 9)))
        row = Request(prompt, config, seed=i)
        span = tuple(rng.randint(3, VOCABULARY - 1) for _ in range(rng.randint(1, 9)))
        shape = rng.randrange(5)
        if shape == 1:
            row = replace(row, suffix=span)
        elif shape == 2:
            row = replace(row, middle=(*span, None, None, *span, None))
        elif shape == 3:
            row = replace(row, middle=span, strength=0.5)
        elif shape == 4 and not isinstance(policy, EditingPolicy):
            row = replace(row, constraint="[c-m]*")
        rows.append(row)
    return rows


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_fifty_rows_that_share_nothing_get_their_own_answers(denoiser, seed):
    rows = mixture(seed, 50)
    alone = [Engine.over(denoiser, PROCESS, 300, tokenizer=Letters()).generate([row])[0] for row in rows]
    assert Engine.over(denoiser, PROCESS, 300, tokenizer=Letters()).generate(rows) == alone
    assert len({len(answer.tokens) for answer in alone}) > 5
    kept = [Letters().decode(answer.tokens) for row, answer in zip(rows, alone, strict=True) if row.constraint]
    assert kept
    assert set("".join(kept)) <= set("cdefghijklm")


def test_rows_join_and_leave_at_any_tick(denoiser):
    rng, rows = random.Random(5), mixture(9, 30)
    alone = [Engine.over(denoiser, PROCESS, 300, tokenizer=Letters()).generate([row])[0] for row in rows]
    engine, waiting, found = Engine.over(denoiser, PROCESS, 300, tokenizer=Letters()), list(enumerate(rows)), {}
    ids: dict[int, int] = {}
    cancelled = set(rng.sample(range(30), 6))
    answers: dict[int, Answer] = {}
    while waiting or engine.num_active or engine.num_waiting:
        for _ in range(min(rng.randint(0, 3), len(waiting))):
            number, row = waiting.pop(0)
            ids[engine.add(row)] = number
        for update in engine.step():
            number = ids[update.row]
            found[number] = found.get(number, 0) + 1
            if number in cancelled and found[number] == 2:
                engine.cancel(update.row)
            elif update.state.finish_reason is not None:
                answers[number] = answer_of(update.state, EOS)
    assert all(answers[number] == alone[number] for number in answers)
    assert set(range(30)) - set(answers) <= cancelled
