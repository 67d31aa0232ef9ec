"""Laws of policies that take tokens back: their reverse chains have the noise's marginals, and they come to an end."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import EOS, MASK, PAD, PROCESS, VOCABULARY, new_denoiser, new_engine, requests, revising

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.revise import AncestralPolicy, EditingPolicy, Moment, RemaskingPolicy
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.schedule import CosineSchedule, PolynomialSchedule

pytestmark = pytest.mark.usefixtures("one_thread")
GRID = (np.arange(20_000, dtype=np.float32) + 0.5) / 20_000


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser()


def chances(policy, alpha_t: float, alpha_s: float) -> tuple[float, float]:
    """With which a mask is revealed and a token masked again, by asking for each u of a fine grid."""
    now = {"agrees": GRID < 0, "confidence": GRID, "u": GRID, "step": 3, "steps": 9, "quota": 0}
    masks, tokens = (
        policy.revise(Moment(is_mask=np.full(len(GRID), is_mask), alpha_t=alpha_t, alpha_s=alpha_s, **now))
        for is_mask in (True, False)
    )
    assert not masks.remask.any()
    assert not tokens.fill.any()
    return masks.fill.mean(), tokens.remask.mean()


@given(
    alphas=st.tuples(st.floats(0.001, 0.999), st.floats(0, 1)),
    eta=st.floats(0, 1),
    strategy=st.sampled_from(["cap", "rescale"]),
)
def test_every_sigma_keeps_the_share_of_masks(alphas, eta, strategy):
    alpha_t = alphas[0]
    alpha_s = alpha_t + (1 - alpha_t) * alphas[1]
    reveal, sigma = chances(RemaskingPolicy(eta=eta, strategy=strategy), alpha_t, alpha_s)
    share = (1 - alpha_t) * (1 - reveal) + alpha_t * sigma
    assert share == pytest.approx(1 - alpha_s, abs=2 / len(GRID))


@given(alphas=st.tuples(st.floats(0, 0.999), st.floats(0, 1)))
def test_ancestral_sampling_masks_none_again(alphas):
    alpha_t, alpha_s = alphas[0], alphas[0] + (1 - alphas[0]) * alphas[1]
    reveal, sigma = chances(AncestralPolicy(), alpha_t, alpha_s)
    assert sigma == 0
    assert reveal == pytest.approx((alpha_s - alpha_t) / (1 - alpha_t), abs=2 / len(GRID))


@pytest.mark.parametrize("policy", [AncestralPolicy(), RemaskingPolicy(eta=1), RemaskingPolicy(strategy="rescale")])
def test_a_schedule_that_leaves_no_mask_that_can_be_told_reveals_all(denoiser, policy):
    assert chances(policy, 1.0, 1.0) == (1, 0)
    steep = AbsorbingProcess(mask_id=MASK, schedule=PolynomialSchedule(exponent=20))
    config = DecodeConfig(policy=policy, max_tokens=4, block_length=4, steps_per_block=16)
    [answer] = Engine.over(denoiser, steep).generate([Request((5,), config, suffix=(6,))])
    assert (len(answer.tokens), answer.num_calls) == (4, 16)


LAWS = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.6, 0.25, 0.15]])  # of tokens 3, 4, 5 at three positions


class Independent:
    """A denoiser that knows the law of tokens that know nothing of each other: parallel draws are exact."""

    device = torch.device("cpu")
    config = SimpleNamespace(
        model=SimpleNamespace(time_conditioning=False, shifted=False),
        vocab_size=6,
        context_length=3,
        mask_id=MASK,
        eos_id=EOS,
        pad_id=PAD,
    )

    def __call__(self, ids, is_real, read, *, pattern, cache=None):
        logits = torch.full((3, 6), -torch.inf)
        logits[:, 3:] = torch.from_numpy(np.log(LAWS)).float()
        return logits[read % ids.shape[1]]


@pytest.mark.parametrize(
    ("policy", "process"),
    [
        (AncestralPolicy(), AbsorbingProcess(mask_id=MASK, schedule=CosineSchedule())),
        (RemaskingPolicy(eta=0.4), PROCESS),
        (RemaskingPolicy(eta=1, strategy="rescale"), PROCESS),
    ],
    ids=["ancestral", "cap", "rescale"],
)
def test_answers_have_the_law_whatever_is_masked_again(policy, process):
    config = DecodeConfig(policy=policy, max_tokens=3, block_length=3, steps_per_block=5, temperature=1.0)
    number = draws(1_500)
    engine = Engine.over(Independent(), process, 100_000, max_rows=number)
    answers = engine.generate([Request((), config, seed=seed) for seed in range(number)])
    assert {answer.num_calls for answer in answers} == {5}
    found = np.zeros((3, 3, 3))
    for answer in answers:
        found[tuple(token - 3 for token in answer.tokens)] += 1
    expected = number * np.einsum("i,j,k->ijk", *LAWS)
    chi2 = float(((found - expected) ** 2 / expected).sum())
    assert chi2 < 26 + 4.5 * np.sqrt(2 * 26)


@pytest.mark.parametrize("policy", [AncestralPolicy(), EditingPolicy(threshold=0.1)], ids=["ancestral", "editing"])
def test_a_commit_tells_how_sure_its_call_was_of_the_token_that_stands_and_not_of_the_one_proposed(policy):
    config = DecodeConfig(policy=policy, max_tokens=3, block_length=3, steps_per_block=3, temperature=1.0)
    engine = Engine.over(Independent(), PROCESS)
    for seed in range(20):
        engine.add(Request((), config, seed=seed))
    told = [commit for update in iter(engine.step, []) for one in update for commit in one.commits]
    assert len(told) == 60
    assert [sure for *_, sure in told] == pytest.approx([LAWS[at, token - 3] for at, token, _ in told])


@settings(max_examples=draws(50), deadline=None)
@given(request=requests(policies=revising))
def test_a_block_is_final_at_once_fills_all_and_ends_in_its_budget(denoiser, request):
    engine, config = new_engine(denoiser), request.config
    engine.add(request)
    finals, state = [], None
    while updates := engine.step():
        state = updates[0].state
        finals.append(int(state.is_final.sum()))
        assert tuple(state.canvas[: len(request.prompt)]) == request.prompt
        assert tuple(state.canvas[state.canvas_stop :]) == request.suffix
    blocks = -(-config.max_tokens // config.block_length)
    assert state.num_calls <= blocks * config.policy.calls(config.steps_per_block)
    assert not state.is_open.any()
    assert not {MASK, PAD} & set(state.answer(EOS))
    assert all(0 <= later - earlier <= config.block_length for earlier, later in itertools.pairwise(finals))


@settings(max_examples=draws(25), deadline=None)
@given(batch=st.lists(requests(policies=revising) | requests(), min_size=2, max_size=6))
def test_a_row_gets_the_same_tokens_alone_and_in_a_batch(denoiser, batch):
    together = new_engine(denoiser).generate(batch)
    assert together == [new_engine(denoiser).generate([request])[0] for request in batch]


@pytest.mark.parametrize("policy", [AncestralPolicy(), RemaskingPolicy(eta=0.3), EditingPolicy(edit_threshold=1)])
def test_a_token_that_is_kept_is_told_with_its_own_probability_and_not_that_of_another(policy):
    config = DecodeConfig(policy=policy, max_tokens=12, block_length=6, steps_per_block=3, temperature=1.0)
    engine = new_engine(new_denoiser(is_tied=False))  # one that is tied proposes what stands there
    engine.add(Request((5, 6), config, seed=4, top_logprobs=VOCABULARY))
    engine.add(Request((7,), DecodeConfig(max_tokens=12, temperature=1.0), seed=4, top_logprobs=VOCABULARY))
    told, own = list[float](), list[float]()
    while updates := engine.step():
        for update in updates:
            for (_, token, sure), ids, logs in zip(
                update.commits, update.best_tokens, update.best_log_probs, strict=True
            ):
                told.append(sure)
                own += np.exp(logs[ids == token]).tolist()
    assert len(told) == len(own) >= 8
    np.testing.assert_allclose(told, own, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def edited(denoiser: Denoiser, prompt: tuple[int, ...], config: DecodeConfig) -> tuple[list[int], int, int]:
    """Token editing written out: tokens, calls, and how often a token gave way to another one."""
    policy, head, calls, edits = config.policy, len(prompt), 0, 0
    canvas = torch.tensor([*prompt, *[MASK] * config.max_tokens])
    for begin in range(head, len(canvas), config.block_length):
        block = slice(begin, min(begin + config.block_length, len(canvas)))
        steps = config.steps_per_block
        if begin > head:  # a last block that is cut short keeps the pace
            steps = math.ceil(steps * (block.stop - begin) / config.block_length)
        for step in range(steps + policy.max_edits):
            logits = denoiser(canvas[None])[0, block]
            calls += 1
            logits[:, [MASK, PAD]] = -torch.inf
            sure, token = logits.softmax(-1).max(-1)
            is_mask, held = canvas[block] == MASK, canvas[block].clone()
            number = int(is_mask.sum())
            left = steps - step
            quota = number if left <= 1 else -(-number // left)
            ranked = torch.where(is_mask, sure, -1).argsort(descending=True, stable=True)
            fill = is_mask & (sure >= policy.threshold)
            if fill.sum() < quota:
                fill[ranked[:quota]] = True
            edit = ~is_mask & (token != held) & (sure > policy.edit_threshold)
            edits += int(edit.sum())
            canvas[block] = torch.where(fill | edit, token, held)
            if number == 0 and not edit.any():
                break
        if EOS in canvas[head : block.stop].tolist():
            break
    return canvas[head:].tolist(), calls, edits


def test_a_step_of_editing_that_need_not_fill_any_mask_costs_no_call(denoiser):
    policy = EditingPolicy(threshold=1, edit_threshold=1, max_edits=0)
    config = DecodeConfig(policy=policy, quota="by_time", max_tokens=8, block_length=8, steps_per_block=8)
    engine = new_engine(denoiser)
    engine.add(Request((5, 6), config))
    left = [8, *(int((updates[0].state.canvas == MASK).sum()) for updates in iter(engine.step, []))]
    assert left[-1] == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(left))


def test_editing_is_what_its_definition_says():
    denoiser, total = new_denoiser(is_tied=False), 0
    with torch.no_grad():
        for weight in denoiser.blocks.parameters():
            weight.mul_(4 if weight.ndim > 1 else 1)  # so that what stands elsewhere changes minds
    policy = EditingPolicy(threshold=0.4, edit_threshold=0.5, max_edits=4)
    config = DecodeConfig(policy=policy, max_tokens=16, block_length=8, steps_per_block=4)
    for seed in range(10):
        prompt = tuple(np.random.default_rng(seed).integers(3, 23, 5).tolist())
        tokens, calls, edits = edited(denoiser, prompt, config)
        [answer] = new_engine(denoiser).generate([Request(prompt, config)])
        assert answer.num_calls == calls
        assert answer.tokens == (tokens[: tokens.index(EOS)] if EOS in tokens else tokens)
        total += edits
    assert total
