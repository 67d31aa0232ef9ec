"""Laws of corrupting: the stated marginal, from uniforms handed in, with the same bits in numpy and torch."""

import math

import numpy as np
import pytest
import torch
from conftest import draws
from enumeration import IDS, MASK, PROCESSES, REPLACING, TEXT, VOCAB, any_process, bound_processes, kernel
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.interpolating import text_ids
from dllm_core.noise.schedule import LinearSchedule
from dllm_core.noise.times import stratified_times
from dllm_core.noise.uniform import UniformProcess
from dllm_core.seeding import Purpose, uniforms, uniforms64

EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
CHI_SQUARE = {1: 19.5, 2: 23.0, 3: 25.9}  # exceeded once in 100,000, by degrees of freedom


@settings(max_examples=draws(100))
@given(any_process(), st.floats(0, 1))
def test_corrupt_has_the_stated_marginal(process, t):
    """Exact: every cell of a grid over (u, v) once, so only the grid of u rounds, to 1/2000."""
    u, v = (part.ravel() for part in np.meshgrid((np.arange(2000) + 0.5) / 2000, (np.arange(12) + 0.5) / 12))
    for x0 in TEXT:
        xt = process.corrupt(np.full(u.size, x0), np.full(u.size, t), u.astype(np.float32), v)
        found = np.bincount(xt, minlength=VOCAB) / u.size
        np.testing.assert_allclose(found, kernel(process, t)[x0], atol=1 / 2000)


@EVERY_PROCESS
@pytest.mark.parametrize("t", [0.05, 0.5, 0.9])
def test_the_uniforms_of_the_corpus_draw_the_stated_marginal(process, t):
    u = uniforms(7, Purpose.NOISE, 1, np.arange(400), 500)
    v = uniforms64(7, Purpose.REPLACE, 1, np.arange(400), 500)
    for x0 in TEXT:
        xt = process.corrupt(np.full(u.shape, x0), np.full((400, 1), t, np.float32), u, v)
        expected = kernel(process, t)[x0] * u.size
        possible = expected > 0
        found = np.bincount(xt.ravel(), minlength=VOCAB)
        assert found[~possible].sum() == 0
        chi_square = ((found - expected)[possible] ** 2 / expected[possible]).sum()
        assert chi_square < CHI_SQUARE[possible.sum() - 1]


@EVERY_PROCESS
def test_time_zero_is_clean_and_a_later_time_never_gives_a_token_back(process):
    """One u a token over all t: what is noised stays noised."""
    rng = np.random.default_rng(2)
    x0, u, v = rng.choice(TEXT, 5000), rng.random(5000, dtype=np.float32), rng.random(5000)
    kept = np.array([process.mixture(np.float64(t)).keep > u for t in np.linspace(0, 1, 21)])
    assert kept[0].all()
    assert (np.diff(kept.astype(int), axis=0) <= 0).all()
    for t, survives in zip(np.linspace(0, 1, 21), kept, strict=True):
        xt = process.corrupt(x0, np.full(x0.size, t), u, v)
        assert np.array_equal(xt[survives], x0[survives])
        assert (xt[~survives] == x0[~survives]).sum() <= 0.5 * (~survives).sum()  # a third is replaced by itself


@pytest.mark.parametrize("ids", [np.int64, np.uint16, np.uint32])
@EVERY_PROCESS
def test_numpy_and_torch_corrupt_alike_bit_for_bit(process, ids):
    """With u on the very threshold, one below and one above it, where a last bit would tell."""
    rng = np.random.default_rng(1)
    x0, v = rng.choice(TEXT, (500, 40)), rng.integers(0, 1 << 32, (500, 40)) / 2.0**32
    t = np.float32(1) - rng.integers(0, 1 << 24, (500, 1)).astype(np.float32) / (1 << 24)
    mixture = process.mixture(t)
    threshold = np.where(rng.random((500, 40)) < 0.5, mixture.keep, 1 - mixture.text).astype(np.float32)
    u = np.clip(threshold + rng.integers(-1, 2, x0.shape) / np.float32(1 << 24), 0, 1 - 2**-24).astype(np.float32)
    found = process.corrupt(x0.astype(ids), t, u, v)
    in_torch = process.corrupt(*(torch.from_numpy(part) for part in (x0, t, u, v)))
    assert found.dtype == ids
    assert in_torch.dtype == torch.int64
    assert np.array_equal(found, in_torch.numpy())
    assert np.array_equal(process.prior(x0, v), process.prior(*(torch.from_numpy(part) for part in (x0, v))).numpy())


@given(st.integers(2, 70_000), st.data())
def test_replacements_are_even_over_the_text_ids_and_never_the_mask(vocab_size, data):
    mask_id = data.draw(st.integers(0, vocab_size - 1))
    n = vocab_size - 1
    drawn = text_ids((np.arange(n) + 0.5) / n, mask_id, vocab_size, np.empty(0, np.int64))
    assert np.array_equal(drawn, np.delete(np.arange(vocab_size), mask_id))
    least, most = text_ids(np.array([0.0, 1 - 2**-32]), mask_id, vocab_size, np.empty(0, np.int64))
    assert (least, most) == (drawn[0], drawn[-1])


@EVERY_PROCESS
def test_the_canvas_is_what_text_becomes_where_nothing_survives(process):
    """The limit alpha -> 0 of the kernel, whatever the schedule's own end is."""
    v = (np.arange(3000) + 0.5) / 3000
    canvas = np.bincount(process.prior(np.zeros(3000, np.int64), v), minlength=VOCAB) / 3000
    end = process.mix(np.float64(1e-14))
    expected = np.where(IDS == MASK, end.mask, end.text / len(TEXT))
    np.testing.assert_allclose(canvas, expected, atol=1e-6)


@pytest.mark.parametrize("process", REPLACING.values(), ids=REPLACING)
def test_a_process_that_replaces_asks_for_its_second_uniform(process):
    x0 = np.zeros(3, np.int64)
    with pytest.raises(AssertionError, match="second uniform"):
        process.corrupt(x0, np.ones(3), np.zeros(3, np.float32))


@pytest.mark.parametrize("process", [p for p in PROCESSES.values() if isinstance(p, AbsorbingProcess)], ids=str)
@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.9])
def test_the_mask_rate_at_t_is_one_minus_alpha(process, t):
    u = np.random.default_rng(0).random((400, 250), dtype=np.float32)
    x0 = np.zeros((400, 250), np.int64)
    rate = (process.corrupt(x0, np.full((400, 1), t, np.float32), u) == MASK).mean()
    expected = 1 - float(process.schedule.alpha(np.float64(t)))
    assert abs(rate - expected) < 5 * math.sqrt(expected * (1 - expected) / x0.size)


@pytest.mark.parametrize("process", [p for p in PROCESSES.values() if isinstance(p, AbsorbingProcess)], ids=str)
def test_the_weight_is_minus_alpha_prime_over_one_minus_alpha(process):
    t = np.linspace(0.01, 1, 50)
    weight = process.ce_weight(t)
    np.testing.assert_allclose(weight * (1 - process.schedule.alpha(t)), -process.schedule.dalpha_dt(t), rtol=1e-11)
    if isinstance(process.schedule, LinearSchedule):
        np.testing.assert_allclose(weight, 1 / t)
        assert np.array_equal(process.ce_weight(np.float32([1e-4, 0.3])), np.float32(1) / np.float32([1e-4, 0.3]))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_a_hybrid_without_random_text_is_absorbing(gamma):
    rng = np.random.default_rng(3)
    x0, u, v = rng.choice(TEXT, (50, 40)), rng.random((50, 40), dtype=np.float32), rng.random((50, 40))
    t = rng.random((50, 1), dtype=np.float32)
    hybrid = HybridProcess(mask_id=MASK, vocab_size=VOCAB, p_u=0, gamma=gamma)
    absorbing = AbsorbingProcess(mask_id=MASK)
    assert np.array_equal(hybrid.corrupt(x0, t, u, v), absorbing.corrupt(x0, t, u))
    assert np.array_equal(hybrid.prior(x0), absorbing.prior(x0))


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid"])
def test_the_prediction_never_holds_the_mask_and_sums_to_one(kind):
    process = bound_processes(LinearSchedule(), mask_id=3, vocab_size=7)[kind]
    logits = torch.randn(5, 7, requires_grad=True)
    log_probs = process.x0_log_probs(logits)
    assert torch.isneginf(log_probs[:, 3]).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5))
    np.testing.assert_allclose(process.x0_log_probs(logits.detach().numpy()), log_probs.detach().numpy(), atol=1e-6)


def test_a_large_vocabulary_is_replaced_evenly():
    """Chi-square over 50,000 ids."""
    process = UniformProcess(mask_id=50_000, vocab_size=50_001)
    v = uniforms64(1, Purpose.REPLACE, 0, np.arange(2000), 1000)
    xt = process.corrupt(np.zeros(v.shape, np.int64), np.ones((2000, 1), np.float32), np.zeros(v.shape, np.float32), v)
    found = np.bincount(xt.ravel(), minlength=50_001)[:50_000]
    chi_square = ((found - 40.0) ** 2 / 40).sum()
    assert abs(chi_square - 49_999) < 5 * math.sqrt(2 * 49_999)


@pytest.mark.parametrize("length", [2, 3, 8, 16, 50, 333])
def test_times_are_near_evenly_spread_in_every_window_of_the_order(length):
    """No gap on the circle exceeds 2.7 / n, wherever a window of n positions begins."""
    t = stratified_times(5, 2, np.arange(2000), 0.0).astype(np.float64)
    for start in range(0, 2000 - length, 7):
        window = np.sort(t[start : start + length])
        gaps = np.diff(np.append(window, window[0] + 1))
        assert gaps.max() <= 2.7 / length


def test_times_keep_away_from_zero_and_differ_between_epochs():
    first, second = (stratified_times(5, epoch, np.arange(1000), 0.01) for epoch in (0, 1))
    assert first.min() > 0.01
    assert first.max() <= 1
    assert not np.intersect1d(first, second).size > 100
