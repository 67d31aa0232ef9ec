"""What a denoiser that knows the text's law pays, by enumeration: the entropy, and -log p(x) of every text."""

import numpy as np
import pytest
import torch
from conftest import in_long
from small import (
    ABSORBING,
    MASK,
    PROCESSES,
    TEXT,
    VOCAB,
    Oracle,
    autoregressive,
    cost,
    diffusion,
    expected,
    nodes,
    smooth_nodes,
    texts,
)

LAW = np.array([0.5, 0.0, 0.3, 0.2])
EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
TWO = TEXT[:2]


def knowing(ids, *, read, pattern, **ignored):
    return torch.tensor(LAW).clamp_min(1e-30).log().float().expand(int(read.sum()), VOCAB)


def code_length(text: np.ndarray) -> float:
    return -float(np.log(LAW[text]).sum())


@EVERY_PROCESS
@pytest.mark.parametrize("block_length", [None, 1])
def test_an_oracle_of_independent_tokens_pays_their_code_length(process, block_length):
    """So its mean over texts is the entropy. Replaced tokens: to what quadrature holds."""
    near, times = (1e-3, smooth_nodes(40)) if process.replaces else (1e-5, nodes(24))
    for text in (np.array([0]), np.array([2]), np.array([3])):
        objective = diffusion(process, block_length)
        paid = expected(objective, knowing, process, text, times)
        assert paid == pytest.approx(code_length(text), rel=near)


@pytest.mark.parametrize("block_length", [None, 1, 2, 3, 5])
def test_tokens_of_a_row_pay_one_by_one(block_length):
    process = PROCESSES["absorbing-cosine"]
    for text in ([0, 2, 3], [3, 3, 0]):
        paid = expected(diffusion(process, block_length), knowing, process, np.array(text), nodes(20))
        assert paid == pytest.approx(code_length(np.array(text)), rel=1e-5)


def test_an_oracle_of_independent_tokens_pays_the_entropy_under_autoregression():
    paid = 0.0
    for text in texts(2):
        paid += LAW[text].prod() * cost(autoregressive(), knowing, text[None], text[None], 1.0)
    assert paid == pytest.approx(2 * -float((LAW[TEXT] * np.log(LAW[TEXT])).sum()), rel=1e-6)


@pytest.mark.parametrize("process", ABSORBING.values(), ids=ABSORBING)
def test_an_oracle_of_whole_texts_pays_minus_log_p_of_each(process):
    oracle = Oracle(3)
    for text, p in list(zip(oracle.texts, oracle.law, strict=True))[::4]:
        paid = expected(diffusion(process), oracle, process, text, nodes(16))
        assert paid == pytest.approx(-np.log(p), rel=2e-5)


@pytest.mark.parametrize("block_length", [1, 2, 3, 4])
def test_an_oracle_pays_minus_log_p_block_by_block_too(block_length):
    oracle, process = Oracle(4, seed=1, of=TWO), PROCESSES["absorbing"]
    for text, p in list(zip(oracle.texts, oracle.law, strict=True))[::5]:
        paid = expected(diffusion(process, block_length), oracle, process, text, nodes(4))
        assert paid == pytest.approx(-np.log(p), rel=1e-5)


def test_an_oracle_pays_minus_log_p_token_by_token():
    oracle = Oracle(4, of=TWO)
    for text, p in zip(oracle.texts, oracle.law, strict=True):
        noise = np.full((1, 4), MASK)
        assert cost(autoregressive(), oracle, text[None], noise, 1.0) == pytest.approx(-np.log(p), rel=1e-5)


@pytest.mark.parametrize("steps", [1, 2, *in_long(5)])
def test_an_oracle_of_independent_tokens_pays_their_code_length_in_any_number_of_steps(steps):
    ends = [(k / steps, 1 / steps) for k in range(1, steps + 1)]
    text = np.array([0, 3])
    for process in (PROCESSES["absorbing-cosine"], PROCESSES["uniform"], PROCESSES["hybrid"]):
        paid = expected(diffusion(process, steps=steps), knowing, process, text, ends)
        assert paid == pytest.approx(code_length(text), rel=1e-5)
