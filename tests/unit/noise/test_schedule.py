"""Laws of the schedules: where they start and end, their slope, and that numpy and torch agree on them."""

import numpy as np
import pytest
import torch
from enumeration import SCHEDULES, bound_processes
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.schedule import LogLinearSchedule, PolynomialSchedule

EVERY_SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


@EVERY_SCHEDULE
def test_alpha_falls_from_one_to_its_end(schedule):
    t = np.linspace(0, 1, 1001)
    alpha = schedule.alpha(t)
    assert alpha[0] == pytest.approx(1, abs=1e-12)
    assert alpha[-1] == pytest.approx(getattr(schedule, "eps", 0), abs=1e-12)
    assert (np.diff(alpha) < 0).all()


@EVERY_SCHEDULE
def test_the_derivative_is_exact(schedule):
    t = torch.linspace(1e-6, 1, 1001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(t).sum(), t)
    torch.testing.assert_close(schedule.dalpha_dt(t.detach()), slope, atol=1e-12, rtol=1e-12)
    np.testing.assert_allclose(schedule.dalpha_dt(t.detach().numpy()), slope.numpy(), rtol=1e-12, atol=1e-12)


@given(st.floats(0.2, 6), st.floats(0.01, 1))
def test_a_polynomials_slope_is_its_own(exponent, t):
    schedule, time = PolynomialSchedule(exponent=exponent), torch.tensor(t, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.alpha(time), time)
    assert float(schedule.dalpha_dt(np.float64(t))) == pytest.approx(float(slope), rel=1e-12)


def test_log_linear_noise_is_the_exponential_of_its_integral():
    schedule, t = LogLinearSchedule(eps=1e-3), np.linspace(0, 1, 101)
    sigma = -np.log1p(-(1 - 1e-3) * t)
    np.testing.assert_allclose(schedule.alpha(t), np.exp(-sigma), rtol=1e-12)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid", "steep_hybrid"])
@EVERY_SCHEDULE
def test_numpy_and_torch_weigh_a_million_times_alike_in_float32(schedule, kind):
    """In float64 they differ in the last bit; rounded to float32, where u decides, they do not."""
    process = bound_processes(schedule)[kind]
    t = np.float32(1) - np.random.default_rng(3).integers(0, 1 << 24, 1_000_000).astype(np.float32) / (1 << 24)
    ours, theirs = process.mixture(t), process.mixture(torch.from_numpy(t))
    for name in ("keep", "text"):
        one, other = getattr(ours, name), getattr(theirs, name)
        assert one.dtype == np.float64
        assert np.array_equal(one.astype(np.float32), other.float().numpy())
        assert np.array_equal((1 - one).astype(np.float32), (1 - other).float().numpy())


def test_linear_noise_has_the_bits_that_float32_arithmetic_gives():
    """Shards that were written with u < 1 - t in float32 stay what they are."""
    rng = np.random.default_rng(4)
    t = np.float32(1) - rng.integers(0, 1 << 24, 1_000_000).astype(np.float32) / (1 << 24)
    fine = rng.random(t.size).astype(np.float32)  # whose 1 - t float32 rounds
    for times in (t, fine):
        u = np.nextafter(1 - times, np.float32(2)) - np.float32(2**-24) * rng.integers(0, 3, t.size).astype(np.float32)
        noised = AbsorbingProcess(mask_id=9).corrupt(np.zeros(t.size, np.int64), times, u)
        assert np.array_equal(noised == 9, ~(u < 1 - times))
