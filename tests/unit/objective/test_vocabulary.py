"""What is read of logits in passes over few rows is what the whole array gives in float64, and so is its gradient."""

import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.noise.law import LogProbs
from dllm_core.objective import vocabulary
from dllm_core.objective.vocabulary import LogitsLaw, nll


def masked_log_probs(logits: torch.Tensor, mask_id: int) -> torch.Tensor:
    shown = logits.double().clone()
    shown[:, mask_id] = -torch.inf
    return shown.log_softmax(-1)


@st.composite
def asked(draw):
    """(logits, mask id, x0, xt, log-odds): from times at which nearly all is text to such at which none is."""
    rows, vocab = draw(st.integers(1, 40)), draw(st.integers(3, 70))
    mask_id = draw(st.integers(0, vocab - 1))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 30)))
    logits = torch.randn(rows, vocab, generator=generator) * draw(st.sampled_from([0.3, 4.0, 25.0]))
    logits[:, mask_id] = draw(st.sampled_from([-50.0, 0.0, 60.0]))
    text = torch.tensor([i for i in range(vocab) if i != mask_id])
    x0 = text[torch.randint(len(text), (rows,), generator=generator)]
    xt = torch.randint(vocab, (rows,), generator=generator)
    largest = draw(st.sampled_from([-20.0, 5.0, 15.0, 30.0, 42.0]))
    return logits, mask_id, x0, xt, largest - 10 * torch.rand(rows, generator=generator, dtype=torch.float64)


@settings(max_examples=draws(150), deadline=None)
@given(asked(), st.integers(1, 400))
def test_a_law_of_logits_reads_as_its_log_probs_do(situation, elements):
    logits, mask_id, x0, xt, shift = situation
    ours, theirs = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(vocabulary, "_CPU_ELEMENTS", elements)  # any number of rows at a time
        found = LogitsLaw(ours, mask_id).read(x0, xt, shift)
        weights = torch.linspace(0.2, 1, len(x0))
        open_xt = torch.where(xt == mask_id, 0.0, found.of_xt)  # -inf where xt is the mask, as it should
        (weights * (found.of_x0 - 2 * open_xt) + 3 * weights * found.others).sum().backward()
    exact = LogProbs(masked_log_probs(theirs, mask_id)).read(x0, xt, shift)
    open_xt = torch.where(xt == mask_id, 0.0, exact.of_xt)
    (weights * (exact.of_x0 - 2 * open_xt) + 3 * weights * exact.others).sum().backward()
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=2e-5, atol=2e-5)
    assert (found.of_xt == -torch.inf).equal(xt == mask_id)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=2e-5)
    assert (ours.grad[:, mask_id] == 0).all()


@pytest.mark.parametrize("scale", [1e-4, 1e-8, 1e-12])
def test_small_odds_keep_their_digits(scale):
    """Where nearly all is noise the divergence is a small difference: a plain product of 1 + it would lose it."""
    probs = torch.rand(1, 999, generator=torch.Generator().manual_seed(0)).softmax(-1)
    a = scale * probs
    for folds in (0, 1, 2, 3):
        found = vocabulary._sum_log1p(a.clone(), folds)
        torch.testing.assert_close(found.double(), a.double().log1p().sum(-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_sure_denoiser_has_left_to_learn_is_not_rounded_away(dtype):
    """p - 1 is taken before it gets the type of the logits: bf16 knows no p between 0.998 and 1."""
    logits = torch.zeros(2, 50, dtype=dtype)
    logits[:, 7] = 11.0
    logits.requires_grad_()
    exact = masked_log_probs(logits.detach(), 3)
    cost = nll(logits, torch.tensor([7, 8]), 3)
    cost.sum().backward()
    torch.testing.assert_close(cost.double(), -exact[[0, 1], [7, 8]], rtol=1e-2, atol=0)
    assert logits.grad.dtype == dtype
    torch.testing.assert_close(logits.grad[0, 7].double(), exact[0, 7].expm1(), rtol=1e-2, atol=0)
    torch.testing.assert_close(logits.grad[1, [7, 8]].float(), torch.tensor([1.0, -1.0]), rtol=1e-2, atol=0)


def test_the_gradient_takes_the_place_of_logits_that_a_model_made_and_of_no_others():
    """A caller's own logits stay; who would read a model's again is refused by autograd, not given another number."""
    own, target = torch.randn(6, 11, requires_grad=True), torch.full((6,), 4)
    kept = own.detach().clone()
    nll(own, target, 0).sum().backward()
    assert torch.equal(own, kept)
    made = own * 1.0
    cost = nll(made, target, 0).sum()
    cost.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        cost.backward()


def test_no_rows_cost_nothing():
    logits = torch.empty(0, 5, requires_grad=True)
    none = torch.empty(0, dtype=torch.long)
    found = LogitsLaw(logits, 1).read(none, none, torch.empty(0, dtype=torch.float64))
    (nll(logits, none, 1).sum() + found.others.sum()).backward()
    assert logits.grad.shape == (0, 5)
