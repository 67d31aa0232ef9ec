"""Sums and divisors: no split of a batch, no prompt and no filler changes a step; each normalization is its formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from small import (
    LINEAR,
    MASK,
    PROCESSES,
    TEXT,
    Recorded,
    autoregressive,
    batch_of,
    diffusion,
    every_objective,
    masked_lm,
    new_denoiser,
    rows_at,
)

from dllm_core.data.batch import Batch
from dllm_core.data.noising import CorpusNoise
from dllm_core.data.order import SampleOrder
from dllm_core.objective.loss import LossSum

pytestmark = pytest.mark.usefixtures("one_thread")
OBJECTIVES = every_objective()
EVERY_OBJECTIVE = pytest.mark.parametrize("name", OBJECTIVES)


def noised(name: str, seed: int = 0, rows: int = 6, length: int = 8) -> Batch:
    """Prompts, filler, isolated documents and noise of the kind that the objective of a name knows."""
    rng = np.random.default_rng(seed)
    process = next((p for kind, p in PROCESSES.items() if kind in name and p.replaces), LINEAR)
    x0 = rng.choice(TEXT, (rows, length))
    is_real = np.arange(length) < rng.integers(4, length + 1, (rows, 1))
    starts = rng.random(x0.shape) < 0.2
    starts[:, 0] = True
    counted = is_real & (np.arange(length) >= rng.integers(0, 3, (rows, 1)))
    t = rng.integers(1, 5, (rows, 1)) / 4
    u, v = rng.random(x0.shape, dtype=np.float32), rng.random(x0.shape)
    xt = np.where(counted, process.corrupt(x0, np.broadcast_to(t, x0.shape).astype(np.float32), u, v), x0)
    others = {"is_real": is_real, "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32)}
    return batch_of(x0, xt, t, loss_mask=counted, counters=rng.integers(0, 999, rows), **others)


def sums(losses: list[LossSum]) -> list[float]:
    total = [sum(float(getattr(loss, name)) for loss in losses) for name in ("nats", "bound_nats")]
    return [*total, sum(loss.num_tokens for loss in losses), sum(loss.divisor for loss in losses)]


@EVERY_OBJECTIVE
@settings(max_examples=draws(8), deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5))
def test_any_two_parts_of_a_batch_give_the_sums_of_the_whole(name, seed, cut):
    batch, denoiser, objective = noised(name, seed), new_denoiser(seed), OBJECTIVES[name]
    whole = sums([objective.loss(denoiser, batch)])
    parts = sums([objective.loss(denoiser, rows_at(batch, at)) for at in (slice(0, cut), slice(cut, None))])
    assert parts == pytest.approx(whole, rel=1e-4, nan_ok=True)
    assert parts[2:] == whole[2:]


@EVERY_OBJECTIVE
def test_prompts_and_filler_are_not_asked_and_filler_is_not_seen(name):
    batch, objective = noised(name, 1), OBJECTIVES[name]
    recorded = Recorded(new_denoiser())
    loss = objective.loss(recorded, batch)
    for ids, read, _ in recorded.asked:
        assert not (read & ~batch.loss_mask).any()
        is_prompt = batch.is_real & ~batch.loss_mask
        if not isinstance(objective, type(autoregressive())):
            assert np.array_equal(ids[:, :8][is_prompt], batch.x0[is_prompt])  # shown as it is
    x0 = np.where(batch.is_real, batch.x0, (batch.x0 + 2) % 4)
    again = objective.loss(new_denoiser(), replace(batch, x0=x0, xt=np.where(batch.is_real, batch.xt, x0)))
    assert sums([again]) == pytest.approx(sums([loss]), rel=1e-6, nan_ok=True)
    assert loss.num_tokens == batch.loss_mask.sum()


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid"])
@pytest.mark.parametrize("block_length", [None, 3])
def test_a_prompt_is_never_noised(kind, block_length):
    rng = np.random.default_rng(0)
    x0, is_learned = rng.choice(TEXT, (40, 12)), rng.random((40, 12)) < 0.5
    noise = CorpusNoise(PROCESSES[kind], SampleOrder(0, 40), 0.5, block_length)
    xt, _ = noise.corrupt(0, np.arange(40), x0, is_learned)
    assert np.array_equal(xt[~is_learned], x0[~is_learned])
    assert (xt[is_learned] != x0[is_learned]).mean() > 0.4
    chosen, asked = masked_lm(rate=1.0).corrupt(x0, np.arange(40), is_learned)
    assert np.array_equal(asked, is_learned)
    assert np.array_equal(chosen[~is_learned], x0[~is_learned])


def plain_costs(denoiser, batch: Batch) -> torch.Tensor:
    """-log p at every position [B L], straight from the logits."""
    isolation = {name: torch.from_numpy(getattr(batch, name)) for name in ("is_real", "segment_ids")}
    logits = denoiser(torch.from_numpy(batch.xt), **isolation)
    logits[..., MASK] = -torch.inf
    return -logits.log_softmax(-1).gather(-1, torch.from_numpy(batch.x0)[..., None])[..., 0].detach()


def test_each_normalization_is_its_formula():
    batch, denoiser = noised("diffusion", 3), new_denoiser()
    ce, mask = plain_costs(denoiser, batch), torch.from_numpy((batch.xt == MASK) & batch.loss_mask)
    weighted = torch.where(mask, ce / torch.from_numpy(batch.t), 0.0)
    answers = torch.from_numpy(batch.loss_mask).sum(1)
    expected = {
        "tokens": weighted.sum() / answers.sum(),
        "noised": weighted.sum() / mask.sum(),
        "answer": (weighted.sum(1) / answers).mean(),  # each row weighs as much, however short
    }
    for normalize, value in expected.items():
        loss = diffusion(normalize=normalize).loss(denoiser, batch)
        assert float(loss.nats) / loss.divisor == pytest.approx(float(value), rel=1e-5), normalize
        assert float(loss.bound_nats) == pytest.approx(float(weighted.sum()), rel=1e-5)
    plain = diffusion(weight="none", normalize="noised").loss(denoiser, batch)
    assert float(plain.nats) / plain.divisor == pytest.approx(float(ce[mask].mean()), rel=1e-5)
    assert float(plain.bound_nats) == pytest.approx(float(weighted.sum()), rel=1e-5)


def test_the_loss_is_that_of_llada():
    """p = (1 - eps) t + eps; sum of M CE / p over B L: arXiv:2502.09992. Ours at t = p, whatever t_min = eps."""
    rng, eps = np.random.default_rng(0), 1e-3
    x0 = rng.choice(TEXT, (4, 9))
    p = ((1 - eps) * rng.random((4, 1)) + eps).astype(np.float32)
    is_masked = rng.random(x0.shape) < p
    every = {"is_real": np.ones_like(is_masked), "segment_ids": np.ones(x0.shape, np.int32)}
    batch, denoiser = batch_of(x0, np.where(is_masked, MASK, x0), p, **every), new_denoiser()
    theirs = (torch.from_numpy(is_masked / p) * plain_costs(denoiser, batch)).sum() / (4 * 9)
    loss = diffusion().loss(denoiser, batch)
    assert float(loss.nats) / loss.divisor == pytest.approx(float(theirs), rel=1e-5)


def test_a_row_that_teaches_nothing_is_no_row_of_answers():
    batch = noised("diffusion", 4)
    empty = replace(batch, loss_mask=np.where(np.arange(6)[:, None] < 2, False, batch.loss_mask))
    for objective in (diffusion(normalize="answer"), autoregressive(normalize="answer")):
        loss = objective.loss(new_denoiser(), empty)
        assert loss.divisor == 4.0
        rest = objective.loss(new_denoiser(), rows_at(batch, slice(2, None)))
        assert float(loss.nats) == pytest.approx(float(rest.nats), rel=1e-5)


@EVERY_OBJECTIVE
def test_a_batch_without_a_counted_token_costs_nothing_and_has_a_gradient(name):
    batch = replace(noised(name, 5), loss_mask=np.zeros((6, 8), bool))
    denoiser = new_denoiser()
    loss = OBJECTIVES[name].loss(denoiser, batch)
    loss.nats.backward()
    assert (float(loss.nats), loss.num_tokens, loss.divisor) == (0.0, 0, 0.0)
    assert denoiser.head.weight.grad is not None


@EVERY_OBJECTIVE
def test_a_denoiser_runs_as_often_as_the_objective_says(name):
    recorded = Recorded(new_denoiser())
    OBJECTIVES[name].loss(recorded, noised(name, 5))
    assert len(recorded.asked) == OBJECTIVES[name].passes


@EVERY_OBJECTIVE
def test_a_loss_is_fp32_in_autocast_and_near_the_one_that_is_all_fp32(name):
    batch, objective = noised(name, 6), OBJECTIVES[name]
    exact = objective.loss(new_denoiser(), batch)
    denoiser = new_denoiser()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective.loss(denoiser, batch)
    assert loss.nats.dtype == torch.float32
    assert loss.nats.requires_grad
    assert not loss.bound_nats.requires_grad
    assert float(loss.nats) == pytest.approx(float(exact.nats), rel=0.02)
    assert float(loss.nats) != float(exact.nats)
    loss.nats.backward()
    grads = [weight.grad for weight in denoiser.parameters() if weight.grad is not None]
    assert grads
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_sums_of_a_large_batch_keep_their_digits_in_autocast():
    """2^14 tokens of log 3 each: bf16 would hold multiples of 128."""
    x0 = np.zeros((256, 64), np.int64)

    def even(ids, *, read, pattern):
        return torch.zeros(int(read.sum()), 4, dtype=torch.bfloat16)

    for objective in (diffusion(), autoregressive()):
        loss = objective.loss(even, batch_of(x0, np.full_like(x0, MASK), 1.0))
        assert float(loss.nats) == pytest.approx(2**14 * np.log(3), rel=1e-6)
