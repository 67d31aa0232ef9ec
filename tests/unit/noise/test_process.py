"""Laws of the forward process."""

import math

import numpy as np
import pytest
import torch

from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.schedule import CosineSchedule, LinearSchedule
from dllm_core.noise.times import stratified_times

SCHEDULES = [LinearSchedule(), CosineSchedule()]
MASK = 3


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_alpha_falls_from_one_to_zero_and_its_derivative_is_exact(schedule):
    t = torch.linspace(0, 1, 101, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    assert float(alpha[0].detach()) == pytest.approx(1, abs=1e-12)
    assert float(alpha[-1].detach()) == pytest.approx(0, abs=1e-12)
    (slope,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(slope, schedule.dalpha_dt(t.detach()), atol=1e-12, rtol=0)
    assert (slope <= 1e-12).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("t", [0.05, 0.3, 0.5, 0.9])
def test_the_mask_rate_at_t_is_one_minus_alpha(schedule, t):
    process = AbsorbingProcess(mask_id=MASK, schedule=schedule)
    u = np.random.default_rng(0).random((400, 250), dtype=np.float32)
    x0 = np.zeros((400, 250), np.int64)
    rate = (process.corrupt(x0, np.full((400, 1), t, np.float32), u) == MASK).mean()
    expected = 1 - float(schedule.alpha(np.float64(t)))
    assert abs(rate - expected) < 5 * math.sqrt(expected * (1 - expected) / x0.size)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_weight_is_minus_alpha_prime_over_one_minus_alpha(schedule):
    t = np.linspace(0.01, 1, 50)
    weight = AbsorbingProcess(mask_id=MASK, schedule=schedule).ce_weight(t)
    np.testing.assert_allclose(weight * (1 - schedule.alpha(t)), -schedule.dalpha_dt(t), rtol=1e-12)
    if isinstance(schedule, LinearSchedule):
        np.testing.assert_allclose(weight, 1 / t)


def test_numpy_and_torch_corrupt_alike_bit_for_bit():
    process = AbsorbingProcess(mask_id=MASK)
    rng = np.random.default_rng(1)
    x0, u = rng.integers(0, 3, (8, 40)), rng.random((8, 40), dtype=np.float32)
    t = rng.random((8, 1), dtype=np.float32)
    in_torch = process.corrupt(torch.from_numpy(x0), torch.from_numpy(t), torch.from_numpy(u))
    assert np.array_equal(process.corrupt(x0, t, u), in_torch.numpy())


def test_the_prediction_never_holds_the_mask_and_sums_to_one():
    logits = torch.randn(5, 7, requires_grad=True)
    log_probs = AbsorbingProcess(mask_id=MASK).x0_log_probs(logits)
    assert torch.isneginf(log_probs[:, MASK]).all()
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(5))


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
