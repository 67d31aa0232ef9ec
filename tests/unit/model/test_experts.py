"""Laws of the mixture of experts: what a token gets is the sum over its own experts, whoever else is there."""

import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import closely, ids_of, mixed_denoiser

from dllm_core.errors import ConfigError
from dllm_core.model.config import ExpertsConfig, ModelConfig
from dllm_core.model.experts import MixtureOfExperts, Router

pytestmark = pytest.mark.usefixtures("one_thread")
DIM = 32
SIZES = ModelConfig(dim=DIM, layers=2, heads=2)


@st.composite
def sections(draw: st.DrawFn) -> ExpertsConfig:
    groups = draw(st.integers(1, 4))
    number = groups * draw(st.integers(1, 4))
    kept = draw(st.integers(1, groups))
    if number < 2:
        groups, number, kept = 1, 2, 1
    return ExpertsConfig(
        num_experts=number,
        num_groups=groups,
        groups_per_token=kept,
        experts_per_token=draw(st.integers(1, kept * number // groups)),
        expert_ffn_dim=draw(st.integers(1, 20)),
        num_shared_experts=draw(st.integers(0, 2)),
        router=draw(st.sampled_from(["softmax", "sigmoid"])),
        routed_scaling=draw(st.sampled_from([1.0, 2.5])),
        normalise=draw(st.booleans()),
        selection_bias=draw(st.booleans()),
    )


def new_mixture(section: ExpertsConfig, seed: int) -> MixtureOfExperts:
    torch.manual_seed(seed)
    mixture = MixtureOfExperts(SIZES, section)
    if section.selection_bias:
        torch.nn.init.normal_(mixture.router.selection_bias, std=0.3)
    return mixture


def tokens(number: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, DIM, generator=torch.Generator().manual_seed(seed))


def chosen_by_hand(router: Router, token: torch.Tensor) -> dict[int, float]:
    """The experts of one token and their weights, from the published rule, one number at a time."""
    own, logits = router.config, (router.weight.double() @ token.double()).tolist()
    if own.router == "sigmoid":
        scores = [1 / (1 + torch.tensor(-logit).exp().item()) for logit in logits]
    else:
        scores = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    bias = router.selection_bias.tolist() if own.selection_bias else [0.0] * len(scores)
    ranked = [score + offset for score, offset in zip(scores, bias, strict=True)]
    size = own.num_experts // own.num_groups
    groups = [list(range(i * size, (i + 1) * size)) for i in range(own.num_groups)]
    worth = [sum(sorted((ranked[i] for i in group), reverse=True)[:2]) for group in groups]
    kept = sorted(range(len(groups)), key=lambda i: -worth[i])[: own.groups_per_token]
    eligible = [i for group in kept for i in groups[group]]
    best = sorted(eligible, key=lambda i: -ranked[i])[: own.experts_per_token]
    total = sum(scores[i] for i in best) if own.normalise and len(best) > 1 else 1.0
    return {i: scores[i] / total * own.routed_scaling for i in best}


@settings(max_examples=draws(60), deadline=None)
@given(section=sections(), number=st.integers(1, 40), seed=st.integers(0, 99))
@torch.no_grad()
def test_a_token_gets_the_weighted_sum_of_its_own_experts(section, number, seed):
    mixture, x = new_mixture(section, seed), tokens(number, seed)
    found = mixture(x[None])[0]
    for token, got in zip(x, found, strict=True):
        wanted = torch.zeros(DIM) if mixture.shared is None else mixture.shared(token)
        for expert, weight in chosen_by_hand(mixture.router, token).items():
            gate, up = (mixture.gate_up[expert] @ token).chunk(2)
            wanted = wanted + weight * (mixture.down[expert] @ (torch.nn.functional.silu(gate) * up))
        size = wanted.abs().max().clamp(min=1)  # rounding goes with it
        closely(got / size, wanted / size)


@settings(max_examples=draws(40), deadline=None)
@given(section=sections(), number=st.integers(16, 60), seed=st.integers(0, 99), data=st.data())
@torch.inference_mode()
def test_a_tokens_bits_do_not_depend_on_who_else_is_there(section, number, seed, data):
    mixture, x = new_mixture(section, seed), tokens(number, seed)
    whole = mixture(x[None])[0]
    kept = data.draw(st.lists(st.integers(0, number - 1), min_size=16, max_size=40))
    assert torch.equal(mixture(x[kept][None])[0], whole[kept])


@settings(max_examples=draws(30), deadline=None)
@given(section=sections(), seed=st.integers(0, 99))
def test_groups_and_experts_are_as_many_as_are_asked_for_and_each_once(section, seed):
    chosen, weights = new_mixture(section, seed).router(tokens(50, seed))
    size = section.num_experts // section.num_groups
    for row in chosen.tolist():
        assert len(set(row)) == section.experts_per_token
        assert len({expert // size for expert in row}) <= section.groups_per_token
    if section.normalise and section.experts_per_token > 1:
        closely(weights.sum(-1), torch.full((50,), section.routed_scaling))


def test_the_bias_counts_in_the_choice_alone():
    section = ExpertsConfig(num_experts=6, experts_per_token=3, selection_bias=True, normalise=False, router="sigmoid")
    mixture = new_mixture(section, 0)
    mixture.router.selection_bias.copy_(torch.tensor([0.0, 9, 0, 9, 9, 0]))
    chosen, weights = mixture.router(tokens(20))
    assert all(set(row) == {1, 3, 4} for row in chosen.tolist())
    closely(weights, (tokens(20) @ mixture.router.weight.T).sigmoid().gather(1, chosen))


def test_gradients_are_those_of_the_plain_sum_and_an_unmet_expert_has_none():
    section = ExpertsConfig(num_experts=4, experts_per_token=2, selection_bias=True)
    mixture, x = new_mixture(section, 1), tokens(12).requires_grad_()
    mixture.router.selection_bias.copy_(torch.tensor([5.0, 5.0, 0, 5.0]))
    mixture(x[None]).square().sum().backward()
    found = {name: p.grad.clone() for name, p in mixture.named_parameters()} | {"x": x.grad.clone()}
    assert not found["gate_up"][2].any()
    assert found["router.weight"].any()
    mixture.zero_grad()
    x.grad = None
    total = torch.zeros(())
    for token in x:
        scores = (mixture.router.weight @ token).softmax(0)
        best = list(chosen_by_hand(mixture.router, token.detach()))
        parts = []
        for expert in best:
            gate, up = (mixture.gate_up[expert] @ token).chunk(2)
            parts.append(scores[expert] * (mixture.down[expert] @ (torch.nn.functional.silu(gate) * up)))
        total = total + (sum(parts) / scores[best].sum()).square().sum()
    total.backward()
    for name, p in [*mixture.named_parameters(), ("x", x)]:
        torch.testing.assert_close(found[name], p.grad, atol=1e-5, rtol=1e-4)


def test_the_router_decides_in_fp32_under_autocast():
    router, x = new_mixture(ExpertsConfig(num_experts=8), 0).router, tokens(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        chosen, weights = router(x)
    assert torch.equal(chosen, router(x)[0])
    assert torch.equal(weights, router(x)[1])


def test_a_model_that_computes_in_bf16_chooses_as_it_was_trained():
    """A bias of steps of 0.001, as balancing makes it, has fewer digits in bf16 than it needs."""
    section = ExpertsConfig(num_experts=64, experts_per_token=8, selection_bias=True, router="sigmoid")
    mixture, x = new_mixture(section, 0), tokens(500).bfloat16()
    expected, weights = mixture.router(x)
    mixture.to(torch.bfloat16)
    assert mixture.down.dtype == torch.bfloat16
    found, others = mixture.router(x)
    assert torch.equal(found, expected)
    assert torch.equal(others, weights)
    assert mixture.to("meta").router.weight.is_meta


def test_the_first_layers_may_be_dense():
    first, second = mixed_denoiser().blocks
    assert not isinstance(first.ffn, MixtureOfExperts)
    assert isinstance(second.ffn, MixtureOfExperts)
    assert mixed_denoiser()(ids_of(1, 1)).shape == (1, 1, 19)


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"num_groups": 3}, r"experts\.num_groups: must divide num_experts=8"),
        ({"num_groups": 2, "groups_per_token": 3}, r"experts\.groups_per_token: must be <= num_groups=2"),
        ({"num_groups": 4, "experts_per_token": 3}, r"experts\.experts_per_token: must be <= 2"),
        ({"first_dense_layers": 4}, r"experts\.first_dense_layers: must be below layers=4"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(section, problem):
    with pytest.raises(ConfigError, match=problem):
        ModelConfig.checked({"experts": section})
