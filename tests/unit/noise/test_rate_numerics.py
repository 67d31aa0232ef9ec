"""The rate in float32, as it is trained: close to float64, finite with its gradient at both ends of time, and lean."""

import numpy as np
import pytest
import torch
from enumeration import SCHEDULES, bound_processes, kernel

from dllm_core.noise.arrays import softplus
from dllm_core.noise.schedule import LinearSchedule

VOCAB, MASK = 1000, 17
PROCESSES = {
    f"{kind}-{name}": process
    for name, schedule in SCHEDULES.items()
    for kind, process in bound_processes(schedule, MASK, VOCAB).items()
}
EVERY_PROCESS = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
ENDS = [0.0, 1e-4, 1e-3, 0.02, 0.5, 0.98, 1 - 1e-3, 1 - 1e-4, 1.0]


def situations(process, spread, seed=0):
    """Every time of ENDS with a masked, a replaced and a clean token, as far as they occur; float32 log-probs [n V].

    spread: how sure the denoiser is; every third of its laws is right.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for t in ENDS:
        mixture = process.mixture(np.float64(t))
        x0, other = 40, 41
        weights = {MASK: mixture.mask, other: mixture.text, x0: mixture.keep + mixture.text}
        rows += [(t, x0, xt, right) for xt, weight in weights.items() if weight > 0 for right in (False, True)]
    t, x0, xt, right = (np.array(column) for column in zip(*rows, strict=True))
    logits = rng.normal(0, spread, (len(rows), VOCAB)).astype(np.float32)
    logits[right, 40] = 3 * spread + 5
    return torch.from_numpy(logits), torch.from_numpy(x0), torch.from_numpy(xt), torch.from_numpy(t.astype(np.float32))


@pytest.mark.parametrize("spread", [0.5, 3, 15])
@EVERY_PROCESS
def test_float32_gives_what_float64_gives(process, spread):
    logits, x0, xt, t = situations(process, spread)
    log_probs = process.x0_log_probs(logits)
    found = process.nelbo_rate(log_probs, x0, xt, t)
    exact = process.nelbo_rate(process.x0_log_probs(logits.double()), x0, xt, t.double())
    assert found.dtype == torch.float32
    assert exact.dtype == torch.float64
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=2e-6)
    np.testing.assert_allclose(
        process.nelbo_rate(log_probs.numpy(), x0.numpy(), xt.numpy(), t.numpy()), found.numpy(), rtol=1e-3, atol=2e-6
    )


@pytest.mark.parametrize("spread", [0.5, 15])
@EVERY_PROCESS
def test_rate_and_gradient_are_finite_at_both_ends_of_time(process, spread):
    """Also where the denoiser rules out half of the vocabulary, the noised token with it."""
    logits, x0, xt, t = situations(process, spread)
    logits[:, 41:500] = -torch.inf
    logits.requires_grad_()
    rate = process.nelbo_rate(process.x0_log_probs(logits), x0, xt, t)
    rate.sum().backward()
    assert torch.isfinite(rate).all()
    assert (rate > -1e-5).all()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[:, MASK] == 0).all()
    assert (logits.grad[:, 41:500] == 0).all()
    assert process.replaces or (logits.grad[xt != MASK] == 0).all()


@EVERY_PROCESS
def test_the_gradient_is_that_of_the_formula(process):
    """Against differences, in float64, over every id of a small vocabulary and through log-softmax."""
    small = process.model_copy(update={"mask_id": 1, "vocab_size": 4} if process.replaces else {"mask_id": 1})
    generator = torch.Generator().manual_seed(0)
    for t in (0.03, 0.5, 0.97):
        xt = torch.arange(4)[torch.from_numpy(kernel(small, t)[2] > 0)]
        logits = torch.randn(len(xt), 4, dtype=torch.float64, generator=generator, requires_grad=True)
        x0, times = torch.full_like(xt, 2), torch.full(xt.shape, t, dtype=torch.float64)

        def rate(logits, x0=x0, xt=xt, times=times):
            return small.nelbo_rate(small.x0_log_probs(logits), x0, xt, times)

        assert torch.autograd.gradcheck(rate, logits, eps=1e-6, atol=1e-6)


def test_softplus_is_one_function():
    x = np.concatenate([[-np.inf], np.linspace(-700, 700, 14_001)])
    np.testing.assert_allclose(softplus(torch.from_numpy(x)).numpy(), softplus(x), rtol=1e-14)


@pytest.mark.parametrize("kind", ["absorbing", "uniform", "hybrid"])
def test_the_gradient_keeps_one_tensor_of_the_vocabulary_at_most(kind):
    process = bound_processes(LinearSchedule(), MASK, VOCAB)[kind]
    log_probs = process.x0_log_probs(torch.randn(64, VOCAB)).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor):
        if tensor.numel() >= log_probs.numel() and tensor.data_ptr() != log_probs.data_ptr():
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    x0 = torch.arange(64) + 20
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        rate = process.nelbo_rate(log_probs, x0, x0 + torch.arange(64) % 2, torch.full((64,), 0.4))
    assert rate.requires_grad
    assert sum(kept.values()) <= (log_probs.numel() if process.replaces else 0)


@EVERY_PROCESS
def test_times_of_rows_are_spread_over_their_tokens(process):
    """t [B 1] against t [B L]."""
    rng = np.random.default_rng(1)
    log_probs = process.x0_log_probs(torch.randn(5, 7, VOCAB))
    x0, t = torch.from_numpy(rng.integers(20, 30, (5, 7))), torch.rand(5, 1) * 0.9 + 0.05
    v = torch.from_numpy(rng.random((5, 7)))
    xt = process.corrupt(x0, t, torch.rand(5, 7), v)
    rate = process.nelbo_rate(log_probs, x0, xt, t)
    torch.testing.assert_close(rate, process.nelbo_rate(log_probs, x0, xt, t.expand(5, 7)))
    assert rate.shape == (5, 7)
