"""Holes of unknown length are grown and shrunk to where the model is surest, and are then like any others."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import EOS, MASK, PAD, VOCABULARY, new_denoiser, new_engine, requests

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.lengths import _spaced, infill
from dllm_core.decoding.request import OpenHole, Request, with_holes
from dllm_core.errors import RequestError
from dllm_core.model.denoiser import Denoiser
from dllm_core.noise.uniform import UniformProcess

given_ids = st.lists(st.integers(3, VOCABULARY - 1), min_size=1, max_size=4).map(tuple)
holes = st.tuples(st.integers(1, 4), st.integers(0, 6)).map(lambda h: OpenHole(h[0], h[0] + h[1]))
REQUEST = Request((5, 9), DecodeConfig(block_length=4, steps_per_block=4, max_tokens=8), suffix=(7,))


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return new_denoiser()


def surest(engine: Engine, request: Request) -> float:
    """Mean log-confidence of what a decode commits."""
    engine.add(request)
    sure: list[float] = []
    while updates := engine.step():
        sure.extend(updates[0].confidence)
    return float(np.log(np.array(sure, np.float64)).mean())


@settings(max_examples=draws(25), deadline=None)
@given(
    pieces=st.lists(given_ids | holes, min_size=1, max_size=4).filter(
        lambda found: any(isinstance(piece, OpenHole) for piece in found)
    ),
    request=requests(suffixes=given_ids),
)
def test_the_found_lengths_are_in_bounds_and_no_hole_is_better_off_a_token_longer_or_shorter(denoiser, pieces, request):
    engine = new_engine(denoiser)
    request = replace(request, config=request.config.model_copy(update={"grow_by": None}))
    found = infill(engine, request, pieces)
    asked = [piece for piece in pieces if isinstance(piece, OpenHole)]
    assert len(found.lengths) == len(asked)
    assert all(hole.least <= n <= hole.most for hole, n in zip(asked, found.lengths, strict=True))
    assert found.request == with_holes(request, pieces, found.lengths)
    assert engine.generate([found.request]) == [found.answer]
    assert not {MASK, PAD} & set(found.answer.tokens)
    assert found.log_confidence == pytest.approx(surest(engine, found.request), abs=1e-6)
    if len(asked) > 1:
        return  # turns end after a few sweeps, wherever they are
    for other in (found.lengths[0] - 1, found.lengths[0] + 1):
        if asked[0].least <= other <= asked[0].most:
            assert surest(engine, with_holes(request, pieces, (other,))) <= found.log_confidence + 1e-6


def test_an_open_end_takes_its_full_length_in_one_decode(denoiser):
    request = replace(REQUEST, suffix=())
    found = infill(new_engine(denoiser), request, [(8,), OpenHole(1, 12)])
    assert (found.lengths, found.num_rows) == ((12,), 1)
    assert found.answer.finish_reason == (
        "stop" if EOS in found.answer.tokens or len(found.answer.tokens) < 13 else "length"
    )


def test_a_search_is_cheaper_than_trying_every_length(denoiser):
    found = infill(new_engine(denoiser), REQUEST, [OpenHole(1, 40)])
    every = [with_holes(REQUEST, [OpenHole(1, 40)], (n,)) for n in range(1, 41)]
    answers = new_engine(denoiser).generate(every)
    assert found.answer in answers
    assert found.num_rows <= 40 + 24  # a first call of each, and those that are decoded
    assert found.answer.num_calls < found.num_calls < 0.7 * sum(answer.num_calls for answer in answers)
    assert found.num_positions > found.answer.num_positions


def test_a_first_call_is_asked_of_every_length_up_to_63_above_the_least_and_then_of_fewer():
    assert _spaced(3, 66) == list(range(3, 67))
    lengths = _spaced(1, 100_000)
    assert (lengths[0], lengths[-1]) == (1, 100_000)
    assert len(lengths) < 320
    assert all((after - before) / before <= 1 / 32 for before, after in itertools.pairwise(lengths[64:]))


def test_a_hole_longer_than_the_context_is_cut_to_what_fits(denoiser):
    found = infill(new_engine(denoiser), REQUEST, [OpenHole(1, 4000)])
    assert found.request.length <= denoiser.config.context_length


@pytest.mark.parametrize(
    ("pieces", "line"),
    [
        ([(5, 6)], "middle: has no open position"),
        ([OpenHole(0, 3)], r"lengths must be at least 1, and the least not above the most, got \[0, 3\]"),
        ([OpenHole(4, 3)], r"got \[4, 3\]"),
        ([OpenHole(50, 60)], "its holes need 50 positions at least, and the context has room for 45"),
    ],
)
def test_what_makes_no_sense_is_refused(denoiser, pieces, line):
    with pytest.raises(RequestError, match=line):
        infill(new_engine(denoiser), REQUEST, pieces)


def test_a_busy_engine_is_refused_and_keeps_its_rows(denoiser):
    engine = new_engine(denoiser)
    engine.add(REQUEST)
    with pytest.raises(RequestError, match="the engine is busy"):
        infill(engine, REQUEST, [OpenHole(1, 3)])
    assert engine.num_waiting == 1


def test_noise_that_replaces_tokens_has_no_confidence_to_go_by():
    denoiser = new_denoiser()
    engine = Engine.over(denoiser, UniformProcess(vocab_size=VOCABULARY, mask_id=MASK), 300, is_ancestral=True)
    with pytest.raises(RequestError, match="needs masks"):
        infill(engine, REQUEST, [OpenHole(1, 3)])
