"""What a mask weighs: complements, context, and chains of T steps against continuous time."""

import numpy as np
import pytest
import torch
from conftest import draws, in_long
from hypothesis import given, settings
from hypothesis import strategies as st
from small import ABSORBING, LINEAR, MASK, TEXT, Recorded, batch_of, diffusion, expected, new_denoiser, nodes, texts

from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.discrete import snapped
from dllm_core.noise.schedule import CosineSchedule
from dllm_core.objective.context import context_weights, context_weights_in_blocks

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT_OF_3 = np.array([0, 3, 2])


def test_over_a_mask_and_its_complement_each_counted_token_is_asked_once():
    rng = np.random.default_rng(0)
    x0, counted = rng.choice(TEXT, (5, 9)), rng.random((5, 9)) < 0.7
    xt = np.where(counted & (rng.random((5, 9)) < 0.4), MASK, x0)
    recorded = Recorded(new_denoiser())
    objective = diffusion(complementary=True, weight="none", normalize="noised")
    loss = objective.loss(recorded, batch_of(x0, xt, 0.4, loss_mask=counted))
    (ids, read, _), (other_ids, other_read, _) = recorded.asked
    assert np.array_equal(read ^ other_read, counted)
    assert not (read & other_read).any()
    for shown, asked in ((ids, read), (other_ids, other_read)):
        assert (shown[asked] == MASK).all()
        assert np.array_equal(shown[~asked], x0[~asked])
    assert 2 * loss.divisor == loss.num_tokens == counted.sum()


@pytest.mark.parametrize("block_length", [None, *in_long(2)])
@pytest.mark.parametrize("process", ABSORBING.values(), ids=ABSORBING)
def test_a_pair_costs_in_the_mean_what_one_mask_does(process, block_length):
    """Loss and bound, under every schedule: where alpha is not even over t, the complements' times are not either."""
    denoiser = new_denoiser()
    with torch.inference_mode():
        single, pair, bound = (
            expected(diffusion(process, block_length, **options), denoiser, process, TEXT_OF_3, nodes(16), of)
            for options, of in (
                ({}, lambda loss: float(loss.nats)),
                ({"complementary": True}, lambda loss: float(loss.nats)),
                ({"complementary": True, "max_weight": 2}, lambda loss: float(loss.bound_nats)),
            )
        )
    assert pair == pytest.approx(single, rel=1e-4)
    assert bound == pytest.approx(pair, rel=1e-5)


@torch.inference_mode()
def test_a_pair_varies_less_than_two_masks_drawn_apart():
    denoiser, times = new_denoiser(), nodes(16, 0.1)

    def moments(**options):
        objective = diffusion(**options)
        first, second = (
            expected(objective, denoiser, LINEAR, TEXT_OF_3, times, lambda loss, n=n: float(loss.nats) ** n) / 0.9
            for n in (1, 2)
        )
        return second - first**2

    assert moments(complementary=True) < 0.9 * moments()
    assert moments(complementary=True, weight="none") < 0.05 * moments(weight="none") / 2
    even = lambda ids, *, read, pattern: torch.zeros(int(read.sum()), 4)  # noqa: E731
    denoiser = even
    assert moments(complementary=True, weight="none") == pytest.approx(0, abs=1e-4)
    assert moments(weight="none") > 1


@pytest.mark.parametrize("block_length", [None, 2])
def test_a_denoiser_is_told_the_times_of_what_it_is_shown(block_length):
    """Of a complement: the time at which so few are masked. Each token's own."""
    process, told = ABSORBING["absorbing-cosine"], []

    def hears(ids, *, read, pattern, t):
        told.append(t.double())
        return torch.zeros(int(read.sum()), 4)

    t = np.random.default_rng(0).uniform(0.1, 0.9, (2, 4))
    batch = batch_of(np.zeros((2, 4), np.int64), np.array([[MASK, 0, 0, MASK]] * 2), t)
    diffusion(process, block_length, complementary=True, time_conditioning=True).loss(hears, batch)
    assert torch.equal(told[0], torch.from_numpy(batch.t).double())
    torch.testing.assert_close(process.schedule.alpha(told[1]), 1 - process.schedule.alpha(told[0]), rtol=0, atol=1e-6)


def test_no_complement_weighs_more_than_a_mask_at_t_min():
    """t close to 1 leaves a token or two clean; masked in the complement they would weigh 1/(1 - t), without end."""
    even = lambda ids, *, read, pattern: torch.zeros(int(read.sum()), 4)  # noqa: E731
    x0, t = np.zeros((1, 2), np.int64), 1 - 2.0**-20
    for t_min, weight in ((0.0, 2**20), (1e-3, 1000)):
        loss = diffusion(complementary=True, t_min=t_min).loss(even, batch_of(x0, np.array([[MASK, 0]]), t))
        assert 2 * float(loss.nats) == pytest.approx((1 + weight) * np.log(3), rel=1e-4)


@given(st.data(), st.integers(1, 3), st.integers(1, 20), st.floats(0.01, 0.99))
def test_context_weights_are_their_definition(data, rows, length, rate):
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    is_clean, starts = (np.array(data.draw(st.lists(flags, min_size=rows, max_size=rows))) for _ in range(2))
    segment_ids = np.cumsum(starts, axis=1) if data.draw(st.booleans()) else None
    expected = np.zeros((rows, length))
    for row in range(rows):
        for i in range(length):
            for j in range(length):
                is_apart = segment_ids is not None and segment_ids[row, i] != segment_ids[row, j]
                if j != i and is_clean[row, j] and not is_apart:
                    expected[row, i] += rate / 2 * (1 - rate) ** (abs(i - j) - 1)
    given_ids = None if segment_ids is None else torch.from_numpy(segment_ids)
    found = context_weights(torch.from_numpy(is_clean), given_ids, rate)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)


def test_far_inside_clean_text_a_context_weight_is_1_and_without_any_0():
    weights = context_weights(torch.ones(1, 201, dtype=torch.bool), None, 0.3)[0]
    assert float(weights[100]) == pytest.approx(1, abs=1e-6)
    assert float(weights[0]) == pytest.approx(0.5, abs=1e-6)
    assert (context_weights(torch.zeros(1, 9, dtype=torch.bool), None, 0.3) == 0).all()


def test_a_mask_is_weighed_by_clean_real_tokens_alone():
    """Filler is neither noised nor context."""
    even = lambda ids, *, read, **_: torch.zeros(int(read.sum()), 4)  # noqa: E731
    x0, xt = np.zeros((1, 4), np.int64), np.array([[0, MASK, MASK, 0]])
    is_real = np.array([[True, True, True, False]])
    batch = batch_of(x0, xt, 0.5, is_real=is_real, loss_mask=is_real)
    loss = diffusion(weight="context", context_rate=0.4).loss(even, batch)
    assert float(loss.nats) == pytest.approx((0.2 + 0.2 * 0.6) * np.log(3), rel=1e-5)
    assert float(loss.bound_nats) == pytest.approx(2 * 2 * np.log(3), rel=1e-5)


def weights_by(block_length, is_clean, is_real, segment_ids, rate=0.4) -> np.ndarray:
    """What each position weighs if it is a mask, by the objective: 0 at the others, [B L]."""
    even = lambda ids, *, read, **_: torch.zeros(int(read.sum()), 4)  # noqa: E731
    objective = diffusion(block_length=block_length, weight="context", context_rate=rate)
    found = np.zeros(is_clean.shape)
    for row, at in np.argwhere(~is_clean & is_real):
        counted = np.zeros_like(is_clean)
        counted[row, at] = True
        others = {"is_real": is_real, "segment_ids": segment_ids, "loss_mask": counted}
        batch = batch_of(np.zeros(is_clean.shape, np.int64), np.where(is_clean | ~is_real, 0, MASK), 0.5, **others)
        found[row, at] = float(objective.loss(even, batch).nats) / np.log(3)
    return found


@st.composite
def noised_rows(draw):
    """Clean positions, real ones (padding behind the text or before it) and documents, each [2 L]."""
    length = draw(st.integers(1, 9))
    rows = st.lists(st.booleans(), min_size=length, max_size=length)
    is_clean, starts = (np.array([draw(rows), draw(rows)]) for _ in range(2))
    begin = draw(st.integers(0, length - 1))
    is_real = np.zeros((2, length), bool)
    is_real[0, begin:], is_real[1, : length - begin] = True, True
    return is_clean, is_real, np.cumsum(starts, axis=1)


@settings(max_examples=draws(40), deadline=None)
@given(rows=noised_rows(), block_length=st.integers(1, 10))
def test_in_blocks_a_mask_is_weighed_by_what_it_sees(rows, block_length):
    """Itself a block's; its document's blocks before it as they were; nothing behind it."""
    is_clean, is_real, segment_ids = rows
    expected = np.zeros(is_clean.shape)
    for row, i in np.argwhere(~is_clean & is_real):
        document = np.flatnonzero(is_real[row] & (segment_ids[row] == segment_ids[row, i]))
        block = {j: (j - document[0]) // block_length for j in document}
        for j in document:
            if j != i and (block[j] < block[i] or (block[j] == block[i] and is_clean[row, j])):
                expected[row, i] += 0.2 * 0.6 ** (abs(i - j) - 1)
    found = weights_by(block_length, is_clean, is_real, segment_ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


@settings(max_examples=draws(20), deadline=None)
@given(rows=noised_rows(), more=st.integers(0, 3))
def test_in_one_block_a_mask_weighs_what_it_does_in_a_whole_row(rows, more):
    length = rows[0].shape[1]
    assert np.array_equal(weights_by(length + more, *rows), weights_by(None, *rows))


@given(data=st.data(), length=st.integers(2, 40), block_length=st.integers(1, 12))
def test_the_noise_of_other_blocks_changes_no_weight(data, length, block_length):
    flags = st.lists(st.booleans(), min_size=length, max_size=length)
    first, other = (np.array(data.draw(flags)) for _ in range(2))
    is_own = np.arange(length) // block_length == data.draw(st.integers(0, (length - 1) // block_length))
    both = torch.from_numpy(np.stack([first, np.where(is_own, first, other)]))
    weights = context_weights_in_blocks(both, None, None, 0.3, block_length)
    assert torch.equal(weights[0, is_own], weights[1, is_own])


def chain_bound(denoiser, process, text, steps) -> float:
    """D3PM's bound for masks, written out: sum over steps of (alpha_s - alpha_t)/(1 - alpha_t) E sum of CE at masks."""
    total = 0.0
    alpha = [float(process.schedule.alpha(np.float64(k / steps))) for k in range(steps + 1)]
    for is_masked in texts(len(text), np.array([0, 1])):
        ids = torch.from_numpy(np.where(is_masked, MASK, text)[None])
        logits = denoiser(ids)
        logits[..., MASK] = -torch.inf
        ce = -logits.log_softmax(-1)[0, torch.arange(len(text)), torch.from_numpy(text)].numpy() @ is_masked
        for k in range(1, steps + 1):
            chance = np.where(is_masked, 1 - alpha[k], alpha[k]).prod()
            total += (alpha[k - 1] - alpha[k]) / (1 - alpha[k]) * chance * ce
    return total


@pytest.mark.parametrize("schedule", [LINEAR.schedule, CosineSchedule()])
@torch.inference_mode()
def test_the_loss_of_a_chain_is_its_bound_in_the_mean_and_tends_to_that_of_continuous_time(schedule):
    process, denoiser = AbsorbingProcess(mask_id=MASK, schedule=schedule), new_denoiser()
    continuous = expected(diffusion(process), denoiser, process, TEXT_OF_3, nodes(16))
    apart = []
    for steps in (1, 2, 8, 32):
        ends = [(k / steps, 1 / steps) for k in range(1, steps + 1)]
        paid = expected(diffusion(process, steps=steps), denoiser, process, TEXT_OF_3, ends)
        assert paid == pytest.approx(chain_bound(denoiser, process, TEXT_OF_3, steps), rel=2e-5)
        apart.append(abs(paid - continuous))
    assert apart[-1] < 0.2 * max(apart)
    assert chain_bound(denoiser, process, TEXT_OF_3, 2000) == pytest.approx(continuous, rel=1e-3)


@pytest.mark.parametrize("steps", [7, 1000, 1 << 20])
def test_a_step_keeps_its_digits_however_many_there_are(steps):
    """The time is float32, whose neighbours are 2^-24 apart: the step is found from its number."""
    even = lambda ids, *, read, **_: torch.zeros(int(read.sum()), 4)  # noqa: E731
    rng = np.random.default_rng(0)
    for t in (snapped(rng.random(1, dtype=np.float32) * 0.9 + 0.1, steps)[0] for _ in range(20)):
        k = round(float(t) * steps)
        loss = diffusion(steps=steps).loss(even, batch_of(np.zeros((1, 1), np.int64), np.array([[MASK]]), t))
        assert float(loss.nats) == pytest.approx(steps / k * np.log(3), rel=1e-5)
