"""Laws of decoding block by block and token by token: what was trained is what is decoded, with and without a cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rows import CONTEXT, EOS, MASK, PAD, PROCESS, VOCABULARY, new_denoiser, new_engine, policies, requests, revising

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.request import Request
from dllm_core.decoding.state import DecodeState
from dllm_core.decoding.step import propose
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.errors import ConfigError, RequestError
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL, AttentionPattern
from dllm_core.noise.process import HybridNoise, UniformNoise
from dllm_core.objective.config import (
    AutoregressiveConfig,
    BlockDiffusionConfig,
    DiffusionConfig,
    MaskedLMConfig,
)
from dllm_core.seeding import Purpose, uniforms

pytestmark = pytest.mark.usefixtures("one_thread")
prompts = st.lists(st.integers(3, VOCABULARY - 1), max_size=22).map(tuple)
left_to_right = st.none() | st.integers(1, 9)  # None: token by token


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser(is_tied=False)


def pattern_of(block_length: int | None) -> AttentionPattern:
    return CAUSAL if block_length is None else AttentionPattern("block_causal", block_length)


@st.composite
def batches(draw: st.DrawFn) -> tuple[AttentionPattern, list[Request]]:
    block_length = draw(left_to_right)
    one = requests(block_length, prompts, st.just(()), guidance=block_length is not None)
    return pattern_of(block_length), draw(st.lists(one, min_size=1, max_size=7))


def greedy(max_tokens: int, block_length: int, prompt: tuple[int, ...] = ()) -> Request:
    config = DecodeConfig(
        policy=LowConfidencePolicy(), block_length=block_length, steps_per_block=block_length, max_tokens=max_tokens
    )
    return Request(prompt, config)


@settings(max_examples=draws(30), deadline=None)
@given(batch=batches(), keeps_keys=st.booleans())
@example(batch=(pattern_of(3), [greedy(1, 3), greedy(3, 3), greedy(24, 3)]), keeps_keys=True).via("ties of masks alone")
def test_a_row_gets_the_same_tokens_alone_and_in_a_batch(denoiser, batch, keeps_keys):
    pattern, wanted = batch
    together = new_engine(denoiser, pattern=pattern, keeps_keys=keeps_keys).generate(wanted)
    alone = [new_engine(denoiser, pattern=pattern, keeps_keys=keeps_keys).generate([request])[0] for request in wanted]
    assert together == alone


@settings(max_examples=draws(30), deadline=None)
@given(batch=batches())
@example(batch=(pattern_of(8), [greedy(24, 8), greedy(20, 8, (5,) * 3)])).via("ties of masks alone")
def test_kept_keys_change_neither_tokens_nor_calls(denoiser, batch):
    pattern, wanted = batch
    kept, computed = (
        new_engine(denoiser, pattern=pattern, keeps_keys=keeps_keys).generate(wanted) for keeps_keys in (True, False)
    )
    assert kept == computed


@settings(max_examples=draws(25), deadline=None)
@given(batch=batches(), max_batch_tokens=st.sampled_from([64, 128]), data=st.data())
def test_rows_that_come_and_go_leave_their_neighbours_as_they_were(denoiser, batch, max_batch_tokens, data):
    """Slots are taken by rows that wait, while others are cancelled at any tick."""
    pattern, wanted = batch
    shared = new_engine(denoiser, max_batch_tokens, pattern=pattern)
    rows = {shared.add(request): request for request in wanted}
    cancelled = data.draw(st.dictionaries(st.integers(1, 12), st.sampled_from(list(rows)), max_size=3))
    answers, tick = {}, 0
    while updates := shared.step():
        answers |= {u.row: u.state.answer(EOS) for u in updates if u.state.finish_reason}
        tick += 1
        if tick in cancelled:
            shared.cancel(cancelled[tick])
    for row, tokens in answers.items():
        [alone] = new_engine(denoiser, pattern=pattern).generate([rows[row]])
        assert tokens == alone.tokens
    assert len(shared._store._free) == len(shared._store.lengths)
    assert answers.keys() | set(cancelled.values()) == rows.keys()


def next_token(denoiser: Denoiser, request: Request, tokens: list[int]) -> int:
    """Autoregression as its definition says it: a whole forward, one token."""
    given = torch.tensor([[MASK, *request.prompt, *tokens]])
    with torch.no_grad():
        logits = denoiser(given, pattern=CAUSAL)[0, -1].double()
    logits[[MASK, PAD]] = -torch.inf
    if not request.config.temperature:
        return int(logits.argmax())
    probs = (logits / request.config.temperature).softmax(0).numpy()
    order = np.argsort(-probs, kind="stable")[: request.config.top_k]
    before = np.cumsum(probs[order]) - probs[order]
    nucleus = order[before < request.config.top_p * probs[order].sum()]
    at = np.cumsum(probs[nucleus])
    u = uniforms(request.seed, Purpose.DECODE, len(tokens), [len(request.prompt) + len(tokens)], 1)[0, 0]
    return int(nucleus[np.searchsorted(at, u * at[-1], side="right")])


@settings(max_examples=draws(60), deadline=None)
@given(
    request=requests(None, prompts, st.just(()), policies=policies | revising, guidance=False), keeps_keys=st.booleans()
)
def test_autoregression_is_a_token_a_call_from_what_stands_before_it(denoiser, request, keeps_keys):
    [answer] = new_engine(denoiser, pattern=CAUSAL, keeps_keys=keeps_keys).generate([request])
    tokens: list[int] = []
    while len(tokens) < request.config.max_tokens and EOS not in tokens:
        tokens.append(next_token(denoiser, request, tokens))
    assert answer.num_calls == answer.num_committed == len(tokens)
    assert answer.tokens_per_call == 1
    assert answer.finish_reason == ("stop" if EOS in tokens else "length")
    assert answer.tokens == tokens[: -1 if EOS in tokens else None]


@settings(max_examples=draws(40), deadline=None)
@given(block_length=st.integers(1, 9), data=st.data(), keeps_keys=st.booleans())
def test_a_block_is_decoded_from_the_laws_it_was_trained_with(denoiser, block_length, data, keeps_keys):
    """At every call: the confidence is the probability that the training pass over [xt ; x0] gives."""
    request = data.draw(requests(block_length, prompts, st.just(()), guidance=False))
    engine = new_engine(denoiser, pattern=pattern_of(block_length), keeps_keys=keeps_keys)
    engine.add(request)
    head, told = len(request.prompt), []
    training = AttentionPattern("block_diffusion", block_length)
    stop = head + request.config.max_tokens
    whole = min(-(-stop // block_length) * block_length, CONTEXT)  # the last block is seen whole, as in training
    canvas = np.array([*request.prompt, *[MASK] * (whole - head)])
    while updates := engine.step():
        [update] = updates
        state = update.state
        blocks = np.unique(update.committed // block_length)
        assert len(blocks) == 1
        stop = min((blocks[0] + 1) * block_length, len(canvas))
        x0 = canvas.copy()
        x0[stop:] = 5  # not seen, whatever it is
        given = torch.from_numpy(np.concatenate([canvas, x0]))[None]
        with torch.no_grad():
            logits = denoiser(given, pattern=training)[0]
        logits[:, [MASK, PAD]] = -torch.inf
        probs = logits.softmax(-1).numpy()
        at = update.committed
        np.testing.assert_allclose(update.confidence, probs[at, state.canvas[at]], rtol=1e-4, atol=1e-6)
        if not request.config.temperature:
            assert (probs[at, state.canvas[at]] >= probs[at].max(-1) - 1e-5).all()
        canvas[at] = state.canvas[at]
        told.append(at)
    blocks = -(-len(canvas) // block_length) - head // block_length
    assert len(told) <= blocks * request.config.steps_per_block


class Watched:
    """Shapes of a denoiser's inputs, forward by forward: of one alone, or of those that are joined."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.shapes: list[list[tuple[int, int]]] = []
        self._denoiser, self._patch = denoiser, pytest.MonkeyPatch()
        self._handle = denoiser.register_forward_pre_hook(lambda _, given: self.shapes.append([tuple(given[0].shape)]))

    def __enter__(self) -> "Watched":
        together = self._denoiser.together

        def watched(parts, pattern):
            self.shapes.append([tuple(part.input_ids.shape) for part in parts])
            return together(parts, pattern)

        self._patch.setattr(self._denoiser, "together", watched)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()
        self._patch.undo()


def test_rows_of_different_lengths_share_a_forward_of_one_new_position_each(denoiser):
    wanted = [greedy(9, 16, (5,) * n) for n in (0, 3, 17, 21)]
    with Watched(denoiser) as watched:
        answers = new_engine(denoiser, pattern=CAUSAL).generate(wanted)
    calls = max(answer.num_calls for answer in answers)
    assert watched.shapes[0] == [(2, 8), (2, 24)]
    assert len(watched.shapes) == calls
    assert {width for (_, width), *others in watched.shapes[1:] if not others} == {1}
    assert all(len(joined) == 1 for joined in watched.shapes[1:])


def test_a_finished_block_is_kept_by_the_call_that_opens_the_next(denoiser):
    """Blocks of 16, one call each: the prompt's with the first canvas block, then [block b ; masks of block b + 1]."""
    config = DecodeConfig(policy=LowConfidencePolicy(), block_length=16, steps_per_block=2, max_tokens=25)
    with Watched(denoiser) as watched:
        [answer] = new_engine(denoiser, pattern=pattern_of(16)).generate([Request((5,) * 23, config)])
    assert answer.finish_reason == "length"
    assert answer.num_calls == 4
    # [0, 32): 23 given; again its own block alone; [16, 48): one block to keep, one to open; again the open one.
    assert watched.shapes == [[(1, 32)], [(1, 16)], [(1, 32)], [(1, 16)]]


def test_what_reads_left_to_right_refuses_what_it_cannot_do(denoiser):
    for pattern in (CAUSAL, pattern_of(4)):
        one = new_engine(denoiser, pattern=pattern)
        with pytest.raises(RequestError, match=r"suffix: the model reads from left to right .* take a model with"):
            one.add(replace(greedy(4, 4), suffix=(5,)))
        with pytest.raises(RequestError, match=f"exceed the context of {CONTEXT}"):
            one.add(greedy(4, 4, (5,) * 45))
        assert one.num_waiting == 0
    with pytest.raises(RequestError, match="block_length: must be 4, in which the model was trained, got 5"):
        new_engine(denoiser, pattern=pattern_of(4)).add(greedy(4, 5))


@pytest.fixture
def bundle(small_bundle: RunDir) -> ModelBundle:
    return read_bundle(small_bundle)


def changed(bundle: ModelBundle, **values: object) -> ModelBundle:
    return replace(bundle, manifest=bundle.manifest.model_copy(update=values))


def test_a_bundle_is_decoded_as_its_objective_says(bundle):
    denoiser, greedy_one = bundle.denoiser(), greedy(10, 4, (7, 8, 9))
    request = replace(greedy_one, config=greedy_one.config.model_copy(update={"temperature": 1.0}))
    answers = set()
    blocks = changed(bundle, objective=BlockDiffusionConfig(), block_length=4)
    for other, pattern in (
        (bundle, AttentionPattern("full")),
        (changed(bundle, objective=DiffusionConfig(weight="none")), AttentionPattern("full")),
        (blocks, AttentionPattern("block_causal", 4)),
        (changed(bundle, objective=AutoregressiveConfig()), CAUSAL),
        (changed(bundle, objective=AutoregressiveConfig(), process=UniformNoise()), CAUSAL),
    ):
        expected = Engine.over(denoiser, bundle.process, pattern=pattern).generate([request])
        for keeps_keys in (True, False):
            assert Engine(other, keeps_keys=keeps_keys).generate([request]) == expected
        answers.add(tuple(expected[0].tokens))
    assert len(answers) == 3  # or nothing would tell the patterns apart


def test_a_bundle_without_a_decoder_is_refused_in_one_line(bundle):
    for values, line in (
        ({"objective": MaskedLMConfig()}, "objective.type: {}, got 'masked_lm'"),
        (
            {"process": HybridNoise(), "objective": BlockDiffusionConfig(), "block_length": 4},
            "noise.process.type: {}, got 'hybrid'",
        ),
    ):
        with pytest.raises(ConfigError, match=line.format("there is no decoder for such a model yet")):
            Engine(changed(bundle, **values))


@settings(max_examples=draws(40), deadline=None)
@given(batch=batches())
def test_a_row_s_confidence_is_the_same_to_the_last_bit_alone_and_in_a_batch(denoiser, batch):
    pattern, wanted = batch
    masks = [np.full(request.config.max_tokens, MASK) for request in wanted]
    rows = [DecodeState.start(request, prior, pattern) for request, prior in zip(wanted, masks, strict=True)]
    together = propose(denoiser, PROCESS, rows)
    for row, proposal in zip(rows, together, strict=True):
        [alone] = propose(denoiser, PROCESS, [row])
        assert np.array_equal(alone.confidence, proposal.confidence)
        assert np.array_equal(alone.tokens, proposal.tokens)
