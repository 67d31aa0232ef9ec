"""Rows of any shape: several holes, spans made anew, canvases that grow, stop strings, guidance, and rows that fail."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import (
    CONTEXT,
    EOS,
    MASK,
    PAD,
    PROCESS,
    VOCABULARY,
    caches,
    new_denoiser,
    new_engine,
    policies,
    requests,
    revising,
)

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.state import DecodeState
from dllm_core.decoding.step import propose
from dllm_core.decoding.unmask import LowConfidencePolicy, ThresholdPolicy
from dllm_core.errors import RequestError
from dllm_core.model.cache import KeyValueStore
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern
from dllm_core.noise.uniform import UniformProcess

pieces = st.lists(st.none() | st.integers(0, VOCABULARY - 1), min_size=1, max_size=24).filter(lambda p: None in p)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser()


@st.composite
def templates(draw: st.DrawFn, guidance: bool = True) -> Request:
    """Holes anywhere; what is given may be masks and end tokens too."""
    request = draw(requests(policies=policies | revising, guidance=guidance))
    return replace(request, middle=tuple(draw(pieces)))


@settings(max_examples=draws(60), deadline=None)
@given(batch=st.lists(templates() | requests(), min_size=1, max_size=5))
def test_holes_are_filled_and_what_stands_between_them_is_kept_alone_and_in_a_batch(denoiser, batch):
    together = new_engine(denoiser).generate(batch)
    assert together == [new_engine(denoiser).generate([request])[0] for request in batch]
    for request, answer in zip(batch, together, strict=True):
        middle = request.middle or (None,) * request.config.max_tokens
        is_ended = request.is_ended_by_model and answer.finish_reason == "stop"
        assert is_ended or len(answer.tokens) == len(middle)
        end = request.open_end - len(request.prompt)
        for i, (asked, got) in enumerate(zip(middle, answer.tokens, strict=False)):
            assert got == asked or (asked is None and got not in {MASK, PAD})
            assert asked is not None or got != EOS or i >= end
        made = [asked for asked, _ in zip(middle, answer.tokens, strict=False) if asked is None]
        assert answer.num_committed == len(made) + is_ended


@pytest.mark.parametrize(
    ("pattern", "suffix"),
    [(FULL, (7,)), (AttentionPattern("block_causal", 4), ()), (CAUSAL, ())],
    ids=["full", "block_causal", "causal"],
)
def test_one_hole_said_in_either_way_is_the_same_row(denoiser, pattern, suffix):
    config = DecodeConfig(max_tokens=9, block_length=4, steps_per_block=2, temperature=1.0)
    one = [Request((5, 6), config, suffix, seed) for seed in range(6)]
    other = [replace(request, middle=(None,) * 9) for request in one]
    first, second = (new_engine(denoiser, pattern=pattern).generate(rows) for rows in (one, other))
    assert first == second


def test_a_mask_that_was_given_takes_no_other_position_s_turn(denoiser):
    """Public decoders count it: the next block is a token short then, and one is left a mask."""
    config = DecodeConfig(policy=LowConfidencePolicy(), block_length=4, steps_per_block=4)
    request = Request((MASK, 5), config, middle=(None, None, MASK, None, None, 9, None, None))
    [answer] = new_engine(denoiser).generate([request])
    assert [answer.tokens[i] for i in (2, 5)] == [MASK, 9]
    assert MASK not in [answer.tokens[i] for i in (0, 1, 3, 4, 6, 7)]
    assert answer.num_calls == 6


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"middle": (5, 6)}, "middle: has no open position"),
        ({"middle": (None, 99)}, "middle: token ids must be in"),
        ({"middle": (5, None), "strength": 0.5}, "middle: must be whole where strength"),
        ({"strength": 0.5}, "middle: must be whole where strength"),
        ({"middle": (), "strength": 0.5}, "middle: must be whole where strength"),
        ({"middle": (5, 6), "strength": 1.5}, r"strength: must be in \(0, 1\], got 1.5"),
        ({"middle": (None,) * 50}, "exceed the context of 48 tokens"),
        ({"stop": ("x",)}, "stop: needs a tokenizer"),
    ],
)
def test_a_row_that_makes_no_sense_is_refused(denoiser, fields, line):
    with pytest.raises(RequestError, match=line):
        new_engine(denoiser).add(Request((5,), DecodeConfig(max_tokens=8), **fields))


@pytest.mark.parametrize("pattern", [AttentionPattern("causal"), AttentionPattern("block_causal", 4)])
def test_what_reads_from_left_to_right_is_given_nothing_behind_a_hole(denoiser, pattern):
    engine = new_engine(denoiser, pattern=pattern)
    with pytest.raises(RequestError, match="does not see what stands behind a hole"):
        engine.add(Request((5,), DecodeConfig(block_length=4, steps_per_block=4), middle=(None, 6, None)))


@settings(max_examples=draws(40), deadline=None)
@given(
    span=st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=20).map(tuple),
    strength=st.floats(0.01, 1),
    request=requests(policies=policies | revising),
)
def test_a_span_is_made_anew_where_noise_at_its_strength_took_it(denoiser, span, strength, request):
    request = replace(request, middle=span, strength=strength)
    engine = new_engine(denoiser)
    engine.add(request)
    state = engine._waiting[0][1]
    is_open = state.is_open.copy()
    head = len(request.prompt)
    assert 1 <= is_open.sum() <= len(span)
    assert not is_open[:head].any()
    assert not is_open[head + len(span) :].any()
    while engine.step():
        pass
    answer = state.answer(EOS)
    assert len(answer) == len(span)
    assert all(got == was for got, was, is_made in zip(answer, span, is_open[head:], strict=False) if not is_made)
    assert not {MASK, PAD} & set(answer)


def test_a_span_loses_the_share_of_its_strength(denoiser):
    number, strength = 2000, 0.3
    engine = new_engine(denoiser)
    opened = [engine._region(Request((), DecodeConfig(), (), seed, (5,) * 20, strength))[1] for seed in range(number)]
    share = np.mean(opened)
    lost = 0.7**20 / 20  # a span of which nothing is lost is given one position
    assert abs(share - strength - lost) < 5 * np.sqrt(strength * (1 - strength) / number / 20)


def test_replaced_tokens_are_run_back_from_the_strength_alone():
    """With a single step from t to 0 at temperature 0, each position takes the likeliest token of what t left."""
    model = new_denoiser(is_tied=False)
    process = UniformProcess(mask_id=MASK, vocab_size=VOCABULARY)
    request = Request((5,), DecodeConfig(steps=4), (6,), 3, (7, 8, 9) * 5, 0.25)
    engine = Engine.over(model, process, is_ancestral=True)
    engine.add(request)
    state = engine._waiting[0][1]
    changed = (state.canvas[1:16] != np.array(request.middle)).sum()
    assert 0 < changed < 12
    times = []
    while state.finish_reason is None:
        times.append(state.times)
        engine.step()
    np.testing.assert_allclose(times, [(0.1875, 0.25), (0.125, 0.1875), (0.0625, 0.125), (0, 0.0625)])
    assert state.num_committed == 15


@settings(max_examples=draws(40), deadline=None)
@given(request=requests(suffixes=st.just(())), grow_by=st.integers(1, 12), cache=caches)
def test_a_canvas_grows_in_whole_blocks_until_an_end_or_its_budget(denoiser, request, grow_by, cache):
    config = request.config.model_copy(update={"grow_by": grow_by, "cache": cache, "refresh_every": None})
    engine = new_engine(denoiser)
    engine.add(replace(request, config=config))
    lengths, state = [], None
    while updates := engine.step():
        state = updates[0].state
        lengths.append(len(state.canvas) - len(request.prompt))
        assert len(state.is_final) == len(state.is_given) == len(state.committed_at) == len(state.canvas)
    assert lengths == sorted(lengths)
    assert lengths[0] <= max(config.grows_by, 1) * 2
    assert all(n % config.block_length == 0 or n == config.max_tokens for n in lengths)
    answer = state.answer(EOS)
    if state.finish_reason == "length":
        assert lengths[-1] == len(answer) == config.max_tokens
    else:
        assert lengths[-1] < len(answer) + 1 + config.grows_by


@pytest.mark.parametrize("block_length", [None, 3], ids=["full", "blocks"])
@settings(max_examples=draws(30), deadline=None)
@given(weight=st.floats(0.1, 5), prompt=st.lists(st.integers(3, 22), min_size=1, max_size=6).map(tuple))
def test_guidance_leads_away_from_the_row_without_what_was_given(denoiser, block_length, weight, prompt):
    """Against two forwards of our own, one with the prompt masked; with kept keys and without them."""
    pattern = AttentionPattern("full" if block_length is None else "block_causal", block_length)
    length = block_length or 6
    config = DecodeConfig(
        policy=LowConfidencePolicy(),
        block_length=length,
        steps_per_block=length,
        max_tokens=-(-len(prompt) // length) * length - len(prompt) + length,
        guidance=weight,
    )
    request = Request(prompt, config)
    canvas = np.array([*prompt, *[MASK] * config.max_tokens])
    blind = np.full(len(canvas), MASK)
    with torch.no_grad():
        seen, unseen = denoiser(torch.from_numpy(np.stack([canvas, blind])), pattern=pattern)
    logits = (unseen + (1 + weight) * (seen - unseen)).double()
    logits[:, [MASK, PAD]] = -torch.inf
    region = np.full(config.max_tokens, MASK)
    state = DecodeState.start(request, region, pattern, mask_id=MASK)
    store = KeyValueStore(denoiser.config.model)
    kept = DecodeState.start(request, region, pattern, mask_id=MASK)
    kept.slots = tuple(store.take(CONTEXT) for _ in range(2))
    for row, held in ((state, None), (kept, store)):
        [proposal] = propose(denoiser, PROCESS, [row], held)
        expected = logits.softmax(-1)[proposal.positions].max(-1)
        np.testing.assert_allclose(proposal.confidence, expected.values, rtol=2e-4)
    one, other = (
        new_engine(denoiser, pattern=pattern, keeps_keys=keeps).generate([request]) for keeps in (True, False)
    )
    assert one == other
    assert one[0].num_positions > 0


def test_guidance_takes_two_passes_a_call_and_none_takes_one(denoiser):
    config = DecodeConfig(policy=LowConfidencePolicy(), block_length=8, steps_per_block=4, max_tokens=8)
    plain, guided = new_engine(denoiser).generate(
        [Request((5,) * 8, config), Request((5,) * 8, config.model_copy(update={"guidance": 1.0}))]
    )
    assert (plain.num_calls, guided.num_calls) == (4, 4)
    assert (plain.num_positions, guided.num_positions) == (64, 128)
    assert plain.tokens != guided.tokens


@pytest.mark.parametrize("cache", ["none", "dual"])
def test_a_row_whose_logits_are_no_numbers_fails_alone_and_leaves_nothing_behind(cache):
    model, poison = new_denoiser(is_tied=False), 22
    config = DecodeConfig(max_tokens=12, block_length=4, steps_per_block=4, cache=cache, policy=LowConfidencePolicy())
    fine = [Request((5 + i, 6), config, seed=i) for i in range(3)]
    expected = new_engine(model).generate(fine)
    with torch.no_grad():
        model.embed.weight[poison] = torch.nan
    engine = new_engine(model)
    bad, *others = engine.generate([Request((poison, 5), config), *fine])
    assert (bad.finish_reason, bad.num_calls, bad.tokens) == ("error", 1, [])
    assert others == expected
    assert engine.generate(fine) == expected  # in the slot that the bad one had
    assert engine._store is None or not engine._store.slots.isnan().any()


class Letters:
    """A tokenizer of one letter a token."""

    def decode(self, ids):
        return "".join(chr(ord("a") + int(i)) for i in ids)


@settings(max_examples=draws(40), deadline=None)
@given(request=requests(suffixes=st.just(())), data=st.data())
def test_the_first_stop_string_ends_the_answer_and_the_row(denoiser, request, data):
    engine = new_engine(denoiser, tokenizer=Letters())
    [whole] = engine.generate([request])
    text = Letters().decode(whole.tokens)
    stop = data.draw(st.sampled_from([text[i : i + n] for n in (1, 2, 3) for i in range(len(text))] or ["?"]))
    [cut] = engine.generate([replace(request, stop=(stop, "!!"))])
    assert cut.text == text.split(stop)[0]
    assert cut.num_calls <= whole.num_calls
    assert cut.finish_reason == ("stop" if stop in text else whole.finish_reason)
    assert engine.num_active == 0


def test_a_stop_string_in_the_first_block_saves_the_other_blocks_calls(denoiser):
    config = DecodeConfig(policy=ThresholdPolicy(threshold=1.0), max_tokens=24, block_length=4, steps_per_block=4)
    request = Request((9,), config, suffix=(4,))
    [whole] = new_engine(denoiser, tokenizer=Letters()).generate([request])
    stop = Letters().decode(whole.tokens[:1])
    [cut] = new_engine(denoiser, tokenizer=Letters()).generate([replace(request, stop=(stop,))])
    assert (whole.num_calls, cut.text) == (24, "")
    assert cut.num_calls <= 4


@settings(max_examples=draws(30), deadline=None)
@given(batch=st.lists(templates() | requests(), min_size=2, max_size=8), budget=st.integers(16, 120))
def test_rows_that_a_tick_has_no_room_for_wait_and_come_first_in_the_next(denoiser, batch, budget):
    batch = [one for one in batch if one.length <= budget]
    engine = new_engine(denoiser, max_batch_tokens=budget)
    for request in batch:
        engine.add(request)
    calls, width = dict.fromkeys(range(len(batch)), 0), 0
    waited: dict[int, int] = {}
    while True:
        before = {row: state.num_positions for row, state in engine._active.items()}
        updates = engine.step()
        if not updates:
            break
        took = [u.state.num_positions - before.get(u.row, 0) for u in updates]
        assert len(updates) == 1 or sum(took) <= budget
        for update in updates:
            calls[update.row] += 1
            waited[update.row] = 0
        for row in engine._active:
            waited[row] = waited.get(row, 0) + 1
            assert waited[row] <= len(batch) + 1
        width = max(width, sum(took))
    alone = [new_engine(denoiser).generate([request])[0].num_calls for request in batch]
    assert list(calls.values())[: len(batch)] == alone
