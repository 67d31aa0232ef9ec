"""Laws of decoding, over random requests to a random denoiser: what holds for any weights holds for trained ones."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import EOS, MASK, PAD, PROCESS, VOCABULARY, new_denoiser, new_engine, requests

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.lengths import infill
from dllm_core.decoding.request import OpenHole, Request
from dllm_core.decoding.state import DecodeState
from dllm_core.decoding.step import propose
from dllm_core.decoding.unmask import LowConfidencePolicy, ThresholdPolicy
from dllm_core.errors import RequestError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import AttentionPattern

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser()


def request_of(max_tokens: int, steps: int) -> Request:
    policy = LowConfidencePolicy()
    config = DecodeConfig(policy=policy, block_length=max_tokens, steps_per_block=steps, max_tokens=max_tokens)
    return Request(prompt=(), config=config)


@pytest.mark.parametrize(
    ("max_tokens", "commits"),
    [(16, [2] * 8), (11, [2, 2, 2, 2, 2, 1]), (9, [2, 2, 2, 2, 1]), (15, [2] * 7 + [1]), (3, [1, 1, 1])],
)
def test_a_last_block_that_is_cut_short_keeps_the_pace_of_those_before(denoiser, max_tokens, commits):
    config = DecodeConfig(policy=LowConfidencePolicy(), block_length=8, steps_per_block=4, max_tokens=max_tokens)
    one, made = new_engine(denoiser), []
    one.add(Request((7, 8), config, suffix=(9,)))  # which no end token cuts short
    while updates := one.step():
        made.append(len(updates[0].committed))
    assert made == commits


@settings(max_examples=draws(60), deadline=None)
@given(request=requests())
def test_a_decode_fills_all_keeps_what_was_given_and_ends_in_its_budget(denoiser, request):
    one = new_engine(denoiser)
    one.add(request)
    finals, state = [], None
    while updates := one.step():
        [update] = updates
        state = update.state
        assert len(update.committed) >= 1
        assert (update.confidence <= 1 + 1e-6).all()
        finals.append(state.is_final.copy())
        assert tuple(state.canvas[: len(request.prompt)]) == request.prompt
        assert tuple(state.canvas[state.canvas_stop :]) == request.suffix
        assert np.isin(state.canvas[state.is_open], MASK).all()
    assert state is not None
    assert not state.is_open.any()
    assert all((later[: len(earlier)] >= earlier).all() for earlier, later in itertools.pairwise(finals))
    whole, rest = divmod(request.config.max_tokens, request.config.block_length)
    steps = request.config.steps_per_block
    last = math.ceil(steps * rest / request.config.block_length) if whole else steps
    assert state.num_calls <= whole * steps + last * (rest > 0)
    answer = state.answer(EOS)
    assert not {MASK, PAD} & set(answer)
    if request.suffix:
        assert len(answer) == request.config.max_tokens
        assert EOS not in answer
    elif state.finish_reason == "length":
        assert len(answer) == request.config.max_tokens


@settings(max_examples=draws(60), deadline=None)
@given(batch=st.lists(requests(), min_size=2, max_size=7))
@example(batch=[request_of(1, 1), request_of(3, 2)]).via("exact ties of confidence, broken by the last bit")
def test_a_row_gets_the_same_tokens_alone_and_in_a_batch(denoiser, batch):
    together = new_engine(denoiser).generate(batch)
    alone = [new_engine(denoiser).generate([request])[0] for request in batch]
    assert together == alone


@pytest.mark.long  # it wants the machine to itself: threads that share their cores with other tests wait for each other
@settings(max_examples=draws(60), deadline=None)
@given(batch=st.lists(requests(), min_size=2, max_size=7))
def test_on_two_threads_too(denoiser, batch):
    """There other kernels, which sum in another order, begin at other numbers of rows."""
    torch.set_num_threads(2)
    try:
        together = new_engine(denoiser).generate(batch)
        alone = [new_engine(denoiser).generate([request])[0] for request in batch]
    finally:
        torch.set_num_threads(1)
    assert together == alone


@pytest.fixture(scope="module")
def half() -> Denoiser:
    return new_denoiser().bfloat16()


@settings(max_examples=draws(30), deadline=None)
@given(batch=st.lists(requests(), min_size=2, max_size=7))
def test_in_bf16_too_on_a_cpu(half, batch):
    """On a GPU, where kernels change with the batch, no more is promised than where scores differ by their rounding."""
    together = new_engine(half).generate(batch)
    assert together == [new_engine(half).generate([request])[0] for request in batch]


@settings(max_examples=draws(60), deadline=None)
@given(batch=st.lists(requests(), min_size=2, max_size=9))
def test_a_row_s_confidence_is_the_same_to_the_last_bit_alone_and_in_a_batch(denoiser, batch):
    rows = [DecodeState.start(request, np.full(request.config.max_tokens, MASK)) for request in batch]
    together = propose(denoiser, PROCESS, rows)
    for row, proposal in zip(rows, together, strict=True):
        [alone] = propose(denoiser, PROCESS, [row])
        assert np.array_equal(alone.confidence, proposal.confidence)
        assert np.array_equal(alone.tokens, proposal.tokens)


@settings(max_examples=draws(30), deadline=None)
@given(request=requests())
def test_what_was_answered_is_never_taken_back(denoiser, request):
    one = new_engine(denoiser)
    one.add(request)
    told: list[int] = []
    while updates := one.step():
        answer = updates[0].state.answer(EOS)
        assert answer[: len(told)] == told
        told = answer


def test_one_token_a_step_is_greedy_order_of_confidence_and_a_zero_threshold_is_one_call_a_block(denoiser):
    slow = DecodeConfig(policy=LowConfidencePolicy(), block_length=8, steps_per_block=8, max_tokens=16)
    fast = slow.model_copy(update={"policy": ThresholdPolicy(threshold=1e-6)})
    answers = [
        new_engine(denoiser).generate([Request(prompt=(5, 6), suffix=(7,), config=config)])[0]
        for config in (slow, fast)
    ]
    assert [answer.num_calls for answer in answers] == [16, 2]


def test_a_cancelled_row_leaves_its_neighbours_as_they_were(denoiser):
    config = DecodeConfig(max_tokens=16, block_length=4, steps_per_block=4)
    wanted = Request(prompt=(9, 8), config=config)
    expected = new_engine(denoiser).generate([wanted])[0]
    shared = new_engine(denoiser)
    victim = shared.add(Request(prompt=(4,), config=config))
    kept = shared.add(wanted)
    shared.step()
    shared.cancel(victim)
    assert shared.num_active == 1
    last = None
    while updates := shared.step():
        assert [update.row for update in updates] == [kept]
        last = updates[0].state
    assert last is not None
    assert last.answer(EOS) == expected.tokens


def test_what_cannot_be_decoded_is_refused_before_it_takes_a_place(denoiser):
    one = new_engine(denoiser)
    with pytest.raises(RequestError, match="exceed the context of 48"):
        one.add(Request(prompt=(5,) * 40, config=DecodeConfig(max_tokens=9)))
    with pytest.raises(RequestError, match="token ids"):
        one.add(Request(prompt=(VOCABULARY,), config=DecodeConfig(max_tokens=4)))
    assert one.num_waiting == 0


def interrupted_at_once(engine: Engine) -> None:
    """Ctrl-C in the next call of its denoiser."""

    def interrupt(*_: object) -> None:
        handle.remove()
        raise KeyboardInterrupt

    handle = engine.denoiser.register_forward_pre_hook(interrupt)


def test_what_is_refused_or_interrupted_leaves_no_row_for_the_next_to_meet():
    engine, good = new_engine(new_denoiser()), Request((5, 6), DecodeConfig(max_tokens=4))
    expected = engine.generate([good])
    with pytest.raises(RequestError, match="token ids"):
        engine.generate([good, replace(good, prompt=(VOCABULARY,))])
    assert engine.generate([good]) == expected
    for decode in (lambda: engine.generate([good]), lambda: infill(engine, good, [OpenHole(1, 2)])):
        interrupted_at_once(engine)
        with pytest.raises(KeyboardInterrupt):
            decode()
        assert engine.generate([good]) == expected


@pytest.mark.parametrize("temperature", [1e-30, 1e-46, 5e-324])
def test_a_temperature_that_is_hardly_any_takes_the_likeliest_tokens_as_none_does(denoiser, temperature):
    """Below 1e-45, which is 0 in float32, laws were no numbers, and the last id of the vocabulary was every answer."""
    cold = DecodeConfig(policy=LowConfidencePolicy(), max_tokens=12, block_length=4, steps_per_block=4)
    batch = [Request((5, 6), cold.model_copy(update={"temperature": t}), (7,)) for t in (0.0, temperature, 1.0)]
    likeliest, taken, drawn = new_engine(denoiser).generate(batch)
    assert taken == likeliest != drawn


def changed(denoiser: Denoiser, **update: object) -> Denoiser:
    """The same weights under another config."""
    other = Denoiser(DenoiserConfig.checked({**denoiser.config.model_dump(), **update})).eval()
    other.load_state_dict(denoiser.state_dict())
    return other


def test_an_end_token_that_is_the_padding_too_ends_answers_all_the_same(denoiser):
    config = DecodeConfig(temperature=1.5, max_tokens=24)
    batch = [Request(prompt=(3, 4), config=config, seed=seed) for seed in range(12)]
    answers = new_engine(changed(denoiser, pad_id=EOS), 2000).generate(batch)
    assert any(answer.finish_reason == "stop" for answer in answers)


def test_shifted_logits_are_decoded_in_blocks_too_where_no_key_is_kept(denoiser):
    shifted = changed(denoiser, model={**denoiser.config.model.model_dump(), "shifted": True})
    batch = [request_of(12, 3), request_of(8, 4)]
    batch = [replace(one, config=one.config.model_copy(update={"block_length": 4})) for one in batch]
    engine = new_engine(shifted, pattern=AttentionPattern("block_causal", 4))
    together = engine.generate(batch)
    assert [engine.generate([one])[0].tokens for one in batch] == [answer.tokens for answer in together]
    assert together != new_engine(denoiser, pattern=AttentionPattern("block_causal", 4)).generate(batch)
