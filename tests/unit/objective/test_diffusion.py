"""Laws of the masked-diffusion objective, against exact enumeration."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dllm_core.data.batch import Batch
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.schedule import CosineSchedule, LinearSchedule
from dllm_core.objective.config import DiffusionConfig
from dllm_core.objective.diffusion import Diffusion

MASK = 3
LAW = torch.tensor([0.5, 0.3, 0.2, 0.0])
CPU = torch.device("cpu")


def batch_of(x0: np.ndarray, xt: np.ndarray, t: np.ndarray) -> Batch:
    return Batch(x0=x0, xt=xt, t=t.astype(np.float32), loss_mask=np.ones(x0.shape, bool), counters=np.arange(len(x0)))


def objective(schedule=None, max_weight=None) -> Diffusion:
    process = AbsorbingProcess(mask_id=MASK, schedule=schedule or LinearSchedule())
    return Diffusion(DiffusionConfig(max_weight=max_weight), process, CPU)


@pytest.mark.parametrize("schedule", [LinearSchedule(), CosineSchedule()])
def test_an_oracle_denoiser_pays_exactly_the_entropy(schedule):
    """i.i.d. tokens and their true law as the denoiser: NELBO = H(p).

    Exact: every text of 2 tokens and every mask pattern, with its probability; t by Gauss-Legendre quadrature.
    """

    def oracle(input_ids, *, read, pattern):
        return LAW.clamp_min(1e-30).log().expand(int(read.sum()), 4)

    nodes, weights = np.polynomial.legendre.leggauss(24)
    total = 0.0
    for t, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        keep = float(schedule.alpha(np.float64(t)))
        for text in itertools.product(range(3), repeat=2):
            for is_masked in itertools.product([False, True], repeat=2):
                probability = math.prod(float(LAW[i]) for i in text)
                probability *= math.prod(1 - keep if masked else keep for masked in is_masked)
                x0 = np.array([text])
                xt = np.where([is_masked], MASK, x0)
                loss = objective(schedule).loss(oracle, batch_of(x0, xt, np.full((1, 2), t)))
                total += weight * probability * float(loss.nats) / loss.num_tokens
    entropy = -sum(float(p) * math.log(float(p)) for p in LAW[:3])
    assert total == pytest.approx(entropy, rel=1e-5)


def test_loss_and_gradient_ignore_clean_positions_and_the_mask_logit():
    rng = np.random.default_rng(0)
    x0 = rng.integers(0, 3, (4, 6))
    xt = np.where(rng.random((4, 6)) < 0.5, MASK, x0)
    batch = batch_of(x0, xt, np.full((4, 6), 0.5))
    is_noised = torch.from_numpy(xt == MASK)

    def evaluate(disturb: torch.Tensor):
        logits = torch.randn(4, 6, 4, generator=torch.Generator().manual_seed(1)) + disturb
        logits.requires_grad_()
        loss = objective().loss(lambda ids, *, read, pattern: logits[read], batch)
        loss.nats.backward()
        return float(loss.nats.detach()), logits.grad

    disturb = torch.zeros(4, 6, 4)
    nats, gradient = evaluate(disturb)
    disturb[~is_noised] = 100.0
    disturb[..., MASK] = 50.0
    disturbed_nats, disturbed_gradient = evaluate(disturb)
    assert disturbed_nats == nats
    assert torch.equal(gradient, disturbed_gradient)
    assert (gradient[~is_noised] == 0).all()
    assert (gradient[..., MASK] == 0).all()
    assert (gradient[is_noised][:, :3] != 0).all()


def test_sums_of_two_halves_are_the_sum_of_the_whole():
    rng = np.random.default_rng(2)
    x0 = rng.integers(0, 3, (6, 5))
    xt = np.where(rng.random((6, 5)) < 0.6, MASK, x0)
    t = rng.uniform(0.1, 1, (6, 5))
    logits = torch.randn(6, 5, 4)

    def loss(rows: slice):
        return objective(max_weight=3).loss(
            lambda ids, *, read, pattern: logits[rows][read], batch_of(x0[rows], xt[rows], t[rows])
        )

    whole, halves = loss(slice(None)), (loss(slice(0, 2)), loss(slice(2, 6)))
    torch.testing.assert_close(whole.nats, halves[0].nats + halves[1].nats)
    torch.testing.assert_close(whole.bound_nats, halves[0].bound_nats + halves[1].bound_nats)
    assert whole.num_tokens == sum(half.num_tokens for half in halves) == 30


def test_a_clipped_weight_changes_the_loss_and_never_the_bound():
    x0, xt = np.zeros((1, 2), np.int64), np.full((1, 2), MASK)
    batch = batch_of(x0, xt, np.array([[0.01, 1.0]]))
    logits = torch.zeros(1, 2, 4)
    free, clipped = (
        objective(max_weight=w).loss(lambda ids, *, read, pattern: logits[read], batch) for w in (None, 5.0)
    )
    assert float(free.nats) == pytest.approx(101 * math.log(3), rel=1e-5)
    assert float(clipped.nats) == pytest.approx(6 * math.log(3), rel=1e-5)
    assert float(clipped.bound_nats) == float(free.bound_nats) == float(free.nats.detach())


def test_filler_tokens_do_not_count():
    x0, xt = np.zeros((1, 4), np.int64), np.full((1, 4), MASK)
    batch = replace(batch_of(x0, xt, np.ones((1, 4))), loss_mask=np.array([[True, True, False, False]]))
    logits = torch.zeros(1, 4, 4)
    loss = objective().loss(lambda ids, *, read, pattern: logits[read], batch)
    assert loss.num_tokens == 2
    assert float(loss.nats) == pytest.approx(2 * math.log(3), rel=1e-6)
