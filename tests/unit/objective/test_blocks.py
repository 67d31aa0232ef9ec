"""Block diffusion against plain diffusion, autoregression and an explicit pass for every block."""

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from small import LINEAR, MASK, PROCESSES, TEXT, Recorded, batch_of, diffusion, new_denoiser

from dllm_core.data.noising import CorpusNoise
from dllm_core.data.order import SampleOrder
from dllm_core.model.pattern import AttentionPattern

pytestmark = pytest.mark.usefixtures("one_thread")
seeds = st.integers(0, 1000)


def some_batch(seed: int, rows: int, length: int, process=LINEAR, t=None, **others):
    rng = np.random.default_rng(seed)
    x0 = rng.choice(TEXT, (rows, length))
    t = rng.uniform(0.1, 1, (rows, 1)) if t is None else t
    times = np.broadcast_to(t, x0.shape)
    xt = process.corrupt(x0, times.astype(np.float32), rng.random(x0.shape, dtype=np.float32), rng.random(x0.shape))
    return batch_of(x0, xt, times, **others)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid"])
@pytest.mark.parametrize("timed", [False, True])
def test_one_block_of_the_whole_row_is_plain_diffusion(kind, timed):
    denoiser = new_denoiser(time_conditioning=timed)
    if timed:
        torch.nn.init.normal_(denoiser.time.modulation.weight, std=0.05)
    process = PROCESSES[kind]
    batch = some_batch(0, 5, 7, process)
    for block_length in (7, 9):
        whole, block = (
            diffusion(process, length, time_conditioning=timed).loss(denoiser, batch) for length in (None, block_length)
        )
        torch.testing.assert_close(whole.nats, block.nats, rtol=2e-6, atol=0)
        assert (whole.num_tokens, whole.divisor) == (block.num_tokens, block.divisor) == (35, 35.0)


def test_blocks_of_one_at_t_1_are_the_same_networks_likelihood_token_by_token():
    """-log p(x_i | x_<i, a mask at i), each by a pass of its own over the clean past and one mask."""
    denoiser, length = new_denoiser(), 6
    x0 = np.random.default_rng(0).choice(TEXT, (3, length))
    loss = diffusion(block_length=1).loss(denoiser, batch_of(x0, np.full_like(x0, MASK), 1.0))
    causal, nats = AttentionPattern("block_causal", 1), torch.zeros(())
    for i in range(length):
        given = torch.from_numpy(np.concatenate([x0[:, :i], np.full((3, 1), MASK)], axis=1))
        logits = denoiser(given, pattern=causal)[:, -1]
        logits[:, MASK] = -torch.inf
        nats = nats - logits.log_softmax(-1).gather(1, torch.from_numpy(x0[:, i : i + 1])).sum()
    torch.testing.assert_close(loss.nats, nats, rtol=1e-5, atol=0)
    torch.testing.assert_close(loss.bound_nats, nats.detach(), rtol=1e-5, atol=0)


@torch.inference_mode()
def test_blocks_of_one_pay_the_same_in_the_mean_at_every_time():
    denoiser = new_denoiser()
    x0 = np.random.default_rng(1).choice(TEXT, (1, 3))
    masked = [np.array([[c == "1" for c in f"{m:03b}"]]) for m in range(8)]
    for t in (0.2, 0.7):
        paid = sum(
            t ** m.sum() * (1 - t) ** (~m).sum()
            * float(diffusion(block_length=1).loss(denoiser, batch_of(x0, np.where(m, MASK, x0), t)).nats)
            for m in masked
        )  # fmt: skip
        at_1 = diffusion(block_length=1).loss(denoiser, batch_of(x0, np.full_like(x0, MASK), 1.0))
        assert paid == pytest.approx(float(at_1.nats), rel=1e-5)


@st.composite
def documents(draw):
    """Rows of isolated documents and, at their ends, filler: (lengths of each row, width)."""
    rows = draw(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=3))
    return rows, max(map(sum, rows)) + draw(st.integers(0, 2))


@settings(max_examples=draws(25), deadline=None)
@given(documents(), st.integers(1, 4), seeds, st.sampled_from(["absorbing", "hybrid"]), st.booleans())
def test_one_pass_is_a_pass_of_its_own_for_every_block_of_every_document(shape, block_length, seed, kind, timed):
    """Documents, filler and a time for each block of each document, together; nothing is shared but the weights."""
    rows, width = shape
    process, rng = PROCESSES[kind], np.random.default_rng(seed)
    denoiser = new_denoiser(seed, time_conditioning=timed)
    if timed:
        torch.nn.init.normal_(denoiser.time.modulation.weight, std=0.05)
    starts = np.zeros((len(rows), width), bool)
    is_real = np.zeros_like(starts)
    for row, lengths in enumerate(rows):
        starts[row, [0, *np.cumsum(lengths)[: None if sum(lengths) < width else -1]]] = True
        is_real[row, : sum(lengths)] = True
    x0 = np.where(is_real, rng.choice(TEXT, starts.shape), 0)
    noise = CorpusNoise(process, SampleOrder(seed, 50), 0.05, block_length)
    xt, t = noise.corrupt(0, np.arange(len(rows)), x0, is_real, starts)
    segment_ids = np.cumsum(starts, axis=1, dtype=np.int32)
    batch = batch_of(x0, xt, noise.per_token(t, width), loss_mask=is_real, segment_ids=segment_ids, is_real=is_real)
    objective = diffusion(process, block_length, time_conditioning=timed)
    alone, nats = diffusion(process, time_conditioning=timed), 0.0
    for row, lengths in enumerate(rows):
        first = 0
        for length in lengths:
            for begin in range(first, first + length, block_length):
                end = min(begin + block_length, first + length)
                assert len(np.unique(batch.t[row, begin:end])) == 1
                nats += _alone(alone, denoiser, batch, row, first, begin, end, block_length, timed)
            first += length
    assert float(objective.loss(denoiser, batch).nats.detach()) == pytest.approx(nats, rel=2e-4, abs=1e-4)


def _alone(objective, denoiser, batch, row, first, begin, end, block_length, timed) -> float:
    """The cost of one block: its clean past and itself as one short row."""
    at = slice(first, end)
    ids = np.concatenate([batch.x0[row, first:begin], batch.xt[row, begin:end]])[None]
    counted = (np.arange(first, end) >= begin)[None]
    times = np.where(counted, batch.t[row, at], 0)

    def behind_the_past(given, *, pattern, t=None, **options):
        return denoiser(given, pattern=AttentionPattern("block_causal", block_length), t=t, **options)

    short = batch_of(batch.x0[row, at][None], ids, np.where(counted, times, 1e-3), loss_mask=counted)
    if timed:
        short.t[~counted] = 0
    return float(objective.loss(behind_the_past, short).nats.detach())


@settings(max_examples=draws(25), deadline=None)
@given(st.integers(1, 4), st.integers(2, 4), st.data(), seeds)
def test_no_later_token_changes_a_blocks_cost_and_no_own_clean_one_its_logits(block_length, blocks, data, seed):
    length = block_length * blocks
    number = data.draw(st.integers(0, blocks - 1))
    begin, end = number * block_length, (number + 1) * block_length
    rng = np.random.default_rng(seed)
    mine = np.zeros((2, length), bool)
    mine[:, begin:end] = True
    batch = some_batch(seed, 2, length, t=1.0, loss_mask=mine)
    batch.xt[:, end:] = np.where(rng.random((2, length - end)) < 0.5, MASK, batch.x0[:, end:])
    told = []
    for first in (length, end, begin):
        recorded = Recorded(new_denoiser(seed))
        x0 = batch.x0.copy()
        x0[:, first:] = (x0[:, first:] + 2) % 4
        xt = np.where(np.arange(length) >= end, x0, batch.xt)  # later blocks' noise too
        changed = batch_of(x0, xt, batch.t, loss_mask=mine)
        loss = diffusion(block_length=block_length).loss(recorded, changed)
        told.append((float(loss.nats.detach()), recorded.asked[0][2]))
    assert told[1][0] == pytest.approx(told[0][0], rel=1e-6)
    for _, logits in told[1:]:
        torch.testing.assert_close(logits, told[0][1], rtol=0, atol=1e-6)
