"""Laws of infilling: holes are where they should be, a side is hidden or seen, and a knowing filler is right."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.engine import Engine
from dllm_core.decoding.unmask import LowConfidencePolicy
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.evaluation.infill import (
    SIDES,
    CausalFiller,
    EngineFiller,
    Filled,
    Hole,
    cut_holes,
    distances,
    score_holes,
    summarize_holes,
    token_gain,
)
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pattern import CAUSAL
from dllm_core.noise.absorbing import AbsorbingProcess

CPU = torch.device("cpu")
MASK, EOS, PAD, TEXT = 0, 1, 2, 11
VOCABULARY = TEXT + 3
PERIOD = 5


@st.composite
def corpora(draw):
    """x0, is_real, counted, segment_ids of a few rows; segments or None."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(8, 24))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    x0 = rng.integers(1, VOCABULARY, (rows, width))
    is_real = np.arange(width) < rng.integers(1, width + 1, (rows, 1))
    counted = is_real & (rng.random((rows, width)) < draw(st.sampled_from([0.6, 0.95, 1.0])))
    segments = np.cumsum(rng.random((rows, width)) < 0.1, axis=1, dtype=np.int32) if draw(st.booleans()) else None
    return x0, is_real, counted, segments


def all_counted(x0: np.ndarray, ids: np.ndarray | None = None) -> HeldoutRows:
    every = np.ones(x0.shape, bool)
    return HeldoutRows(x0, every, np.arange(len(x0)) if ids is None else ids, every)


@settings(max_examples=draws(150), deadline=None)
@given(corpora(), st.integers(1, 6))
def test_a_hole_is_whole_counted_text_of_one_document_with_a_token_on_either_side(corpus, length):
    x0, is_real, counted, segments = corpus
    ids = np.arange(100, 100 + len(x0))
    holes = {
        hole.row_id: hole
        for hole in cut_holes(HeldoutRows(x0, counted, ids, is_real, segments), length, seed=3, never=(EOS, PAD))
    }
    for row, row_id in enumerate(ids.tolist()):
        labels = [
            -1 if not real else 0 if segments is None else int(segments[row, i]) for i, real in enumerate(is_real[row])
        ]
        fitting = {}
        for start in range(len(labels) - length + 1):
            inside = range(start, start + length)
            document = [i for i, label in enumerate(labels) if label == labels[start]]
            is_text = all(counted[row, i] and x0[row, i] not in (EOS, PAD) for i in inside)
            if labels[start] >= 0 and is_text and document[0] < start and start + length - 1 < document[-1]:
                parts = ([i for i in document if i < start], list(inside), [i for i in document if i >= start + length])
                fitting[start] = tuple(tuple(x0[row, part].tolist()) for part in parts)
        assert (row_id in holes) == bool(fitting)
        if fitting:
            hole = holes[row_id]
            assert tuple(tuple(p.tolist()) for p in (hole.before, hole.truth, hole.after)) in fitting.values()


def test_every_place_of_a_row_is_as_likely_and_the_row_id_alone_decides():
    x0 = np.tile(np.arange(3, 13), (9000, 1))
    holes = cut_holes(all_counted(x0), 2, seed=1, never=())
    counts = np.bincount([hole.truth[0] for hole in holes], minlength=13)
    assert set(np.flatnonzero(counts)) == set(range(4, 11))
    assert (abs(counts[4:11] - 9000 / 7) < 5 * np.sqrt(9000 / 7)).all()
    some = np.array([4, 17, 8000])
    again = cut_holes(all_counted(x0[some], some), 2, seed=1, never=())
    assert [hole.truth[0] for hole in again] == [holes[i].truth[0] for i in some]
    other = cut_holes(all_counted(x0), 2, seed=2, never=())
    assert 0.05 < np.mean([one.truth[0] == two.truth[0] for one, two in zip(holes, other, strict=True)]) < 0.25


def test_a_hidden_side_is_all_masks_and_a_seen_one_is_as_it_was():
    hole = Hole(0, np.array([5, 6]), np.array([7]), np.array([8, 9, 10]))
    shown = {side: [part.tolist() for part in hole.shown(side, MASK)] for side in SIDES}
    assert shown == {
        "both": [[5, 6], [8, 9, 10]],
        "left": [[5, 6], [MASK] * 3],
        "right": [[MASK] * 2, [8, 9, 10]],
    }


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_a_distance_counts_steps_to_the_nearest_visible_token(length):
    visible = {"left": [-1], "right": [length], "both": [-1, length]}
    for side in SIDES:
        expected = [min(abs(i - place) for place in visible[side]) for i in range(length)]
        assert distances(length, side).tolist() == expected


class Periodic(torch.nn.Module):
    """Knows that text repeats with PERIOD, from the nearest visible token within `reach`; else it says EOS or, where
    it may not, a token that is never right.

    Under the causal pattern position i is told what stands before i only, as input shifted by one.
    """

    def __init__(self, reach: int = 99) -> None:
        super().__init__()
        self.reach, self.calls = reach, 0
        model = ModelConfig(dim=16, layers=1, heads=2, ffn_dim=16)
        self.config = DenoiserConfig(
            model=model, vocab_size=VOCABULARY, context_length=64, mask_id=MASK, eos_id=EOS, pad_id=PAD
        )
        self.device = CPU

    def forward(self, ids, is_real=None, read=None, *, pattern=None, cache=None):
        self.calls += 1
        logits = torch.zeros(len(read), VOCABULARY)
        logits[:, EOS], logits[:, -1] = 5.0, 4.0
        for k, (row, i) in enumerate(divmod(at, ids.shape[1]) for at in read.tolist()):
            offset = 1 if pattern == CAUSAL else 0
            stop = i + 1 if pattern == CAUSAL else ids.shape[1]
            seen = [(abs(j - offset - i), j - offset, int(ids[row, j])) for j in range(stop) if ids[row, j] > PAD]
            near = min(seen, default=(self.reach + 1, 0, 0))
            if near[0] <= self.reach:
                logits[k, 3 + (near[2] - 3 + i - near[1]) % PERIOD] = 9.0
        return logits


def periodic_rows(rows: int, width: int) -> np.ndarray:
    return 3 + (np.arange(width) + np.arange(rows)[:, None]) % PERIOD


def holes_of(rows: int, width: int, length: int) -> list[Hole]:
    return cut_holes(all_counted(periodic_rows(rows, width)), length, seed=4, never=(MASK, EOS, PAD))


SLOW = DecodeConfig(policy=LowConfidencePolicy(), block_length=4, steps_per_block=4, max_tokens=1)


def engine_filler(denoiser, config=None) -> EngineFiller:
    return EngineFiller(Engine.over(denoiser, AbsorbingProcess(mask_id=MASK), 400), config, MASK, seed=0)


@pytest.mark.parametrize("length", [1, 3, 6])
def test_one_who_knows_the_law_restores_all_from_every_side(length):
    holes = holes_of(12, 24, length)
    assert len(holes) == 12
    fillers = [engine_filler(Periodic(), config) for config in (None, SLOW)]
    fillers.append(CausalFiller(Periodic(), MASK, CPU, never=(EOS, PAD), batch_rows=5))
    for filler, calls in zip(fillers, (1, length, length), strict=True):
        for side in filler.sides:
            found = summarize_holes(score_holes(filler, holes, length, side))
            assert found.exact.value == found.token.value == 1
            assert found.tokens_per_call.value == pytest.approx(length / calls)
            assert found.exact.low < 0.9, "twelve rows prove little"


def test_one_parallel_call_knows_only_what_is_near_and_step_by_step_goes_on_from_there():
    """With reach 2 the middle of a hole of 8 is out of sight until its neighbours are filled."""
    holes = holes_of(10, 30, 8)
    near = {"both": {1, 2}, "left": {1, 2}, "right": {1, 2}}
    for side in SIDES:
        parallel = summarize_holes(score_holes(engine_filler(Periodic(2)), holes, 8, side))
        right = {one.distance for one in parallel.by_distance if one.accuracy.value == 1}
        assert right == near[side]
        assert [one.distance for one in parallel.by_distance] == sorted(set(distances(8, side)))
        hits = {"both": 4, "left": 2, "right": 2}[side]
        assert parallel.token.value == pytest.approx(hits / 8)
        assert parallel.exact.value == 0
        assert parallel.exact.high > 0.1
    stepwise = CausalFiller(Periodic(2), MASK, CPU, never=(EOS, PAD))
    assert summarize_holes(score_holes(stepwise, holes, 8, "left")).exact.value == 1
    with pytest.raises(ValueError, match="left"):
        stepwise.fill(holes, "both")


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    torch.manual_seed(0)
    model = ModelConfig(dim=32, layers=2, heads=2, ffn_dim=48)
    config = DenoiserConfig(model=model, vocab_size=VOCABULARY, context_length=64, mask_id=MASK, eos_id=EOS, pad_id=PAD)
    model = Denoiser(config).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.out.weight.mul_(8)  # so that answers hang on what is seen
    return model


def random_rows(rows: int, width: int) -> np.ndarray:
    return np.random.default_rng(5).integers(3, VOCABULARY, (rows, width))


@pytest.mark.parametrize("kind", ["one call", "engine", "causal"])
def test_a_score_is_a_function_of_the_row_alone_and_parts_join_to_the_whole(denoiser, kind):
    x0, ids = random_rows(14, 40), np.arange(50, 64)

    def scores(rows):
        fillers = {
            "one call": engine_filler(denoiser),
            "engine": engine_filler(denoiser, SLOW.model_copy(update={"temperature": 1.0})),
            "causal": CausalFiller(denoiser, MASK, CPU, never=(EOS, PAD), batch_rows=4),
        }
        holes = cut_holes(all_counted(x0[rows], ids[rows]), 4, seed=9, never=(MASK, EOS, PAD))
        return score_holes(fillers[kind], holes, 4, "left")

    whole = scores(slice(0, 14))
    parts = scores(slice(0, 5)).joined(scores(slice(5, 6))).joined(scores(slice(6, 14)))
    for name in ("hits", "calls", "row_ids"):
        assert np.array_equal(getattr(whole, name), getattr(parts, name))
    assert summarize_holes(whole) == summarize_holes(parts)
    assert 0 < whole.hits.mean() < 0.5


@pytest.mark.parametrize("side", SIDES)
def test_what_a_side_hides_changes_nothing(denoiser, side):
    """Other tokens on the hidden side give the same answers; on a seen side some answers change."""
    holes = [Hole(i, row[:9], row[9:13], row[13:]) for i, row in enumerate(random_rows(12, 24))]
    other = np.random.default_rng(6).integers(3, VOCABULARY, (12, 24))
    for place in ("before", "after"):
        changed = [
            replace(hole, before=row[:9]) if place == "before" else replace(hole, after=row[13:])
            for hole, row in zip(holes, other, strict=True)
        ]
        fillers = [engine_filler(denoiser)]
        if side == "left":
            fillers.append(CausalFiller(denoiser, MASK, CPU, never=(EOS, PAD)))
        for filler in fillers:
            same = all(
                np.array_equal(one.tokens, two.tokens)
                for one, two in zip(filler.fill(holes, side), filler.fill(changed, side), strict=True)
            )
            is_hidden = (side, place) in {("left", "after"), ("right", "before")}
            assert same == is_hidden


def test_causal_answers_are_the_likeliest_continuation_computed_token_by_token(denoiser):
    holes = [Hole(i, row[: 3 + i], row[3 + i : 7 + i], row[7 + i :]) for i, row in enumerate(random_rows(5, 20))]
    answers = CausalFiller(denoiser, MASK, CPU, never=(EOS, PAD)).fill(holes, "left")
    for hole, answer in zip(holes, answers, strict=True):
        text = hole.before.tolist()
        for _ in range(4):
            with torch.inference_mode():
                logits = denoiser(torch.tensor([[MASK, *text]]), pattern=CAUSAL)[0, -1]
            text.append(max(range(3, VOCABULARY), key=lambda token: float(logits[token])))
        assert answer.tokens.tolist() == text[len(hole.before) :]


def test_how_wide_a_row_is_read_is_its_own_length_s_alone(denoiser):
    """Another width sums in another order: the last bit, and so a near tie, would hang on the neighbours."""
    holes = [
        Hole(i, row[: 6 + 3 * i], row[6 + 3 * i : 11 + 3 * i], row[-1:]) for i, row in enumerate(random_rows(5, 30))
    ]

    def widths(some: list[Hole]) -> dict[tuple[int, ...], set[int]]:
        found: dict[tuple[int, ...], set[int]] = {}

        def recorded(ids, **options):
            for hole, row in itertools.product(some, ids.tolist()):
                if row[: len(hole.before) + 2] == [MASK, *hole.before, MASK]:
                    found.setdefault(tuple(hole.before), set()).add(len(row))
            return denoiser(ids, **options)

        CausalFiller(recorded, MASK, CPU, never=(EOS, PAD)).fill(some, "left")
        return found

    together = widths(holes)
    assert together == {key: own for hole in holes for key, own in widths([hole]).items()}
    assert set().union(*together.values()) == {16, 32}


def test_no_answer_holds_what_no_hole_can_hold(denoiser):
    holes = holes_of(8, 24, 5)
    with torch.no_grad():
        sharp = Denoiser(denoiser.config).eval()
        sharp.embed.weight[[MASK, EOS, PAD]] *= 30
    for filler in (engine_filler(sharp), engine_filler(sharp, SLOW), CausalFiller(sharp, MASK, CPU, never=(EOS, PAD))):
        for side in filler.sides:
            assert all((answer.tokens > PAD).all() for answer in filler.fill(holes, side))


class Guess:
    """Right where a coin of chance p falls so, alike for two guessers of one seed."""

    sides = SIDES

    def __init__(self, p: float, seed: int) -> None:
        self.p, self.seed = p, seed

    def fill(self, holes, side):
        rng = np.random.default_rng(self.seed)
        return [Filled(np.where(rng.random(len(h.truth)) < self.p, h.truth, MASK), 1) for h in holes]


def test_a_paired_difference_is_surer_than_two_figures_and_refuses_other_holes():
    holes = holes_of(400, 24, 4)
    one, two = (score_holes(Guess(p, 1), holes, 4, "both") for p in (0.6, 0.5))
    gain = token_gain(one, two)
    a, b = summarize_holes(one).token, summarize_holes(two).token
    assert gain.value == pytest.approx(a.value - b.value)
    assert gain.standard_error < 0.6 * np.hypot(a.standard_error, b.standard_error)
    with pytest.raises(ValueError, match="same holes"):
        token_gain(one, score_holes(Guess(0.5, 1), holes[1:], 4, "both"))


def test_rows_without_room_give_nothing():
    rows = all_counted(periodic_rows(3, 9))
    assert cut_holes(rows, 8, seed=0, never=()) == []
    assert len(cut_holes(rows, 7, seed=0, never=())) == 3
    assert summarize_holes(score_holes(Guess(1, 0), [], 8, "both")) is None
