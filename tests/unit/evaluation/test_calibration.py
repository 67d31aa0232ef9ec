"""Laws of calibration: an oracle's confidence is its accuracy, a boaster's is not, and the figures say by how much."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dllm_core.evaluation.calibration import CalibrationScores, score_calibration, summarize_calibration
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.schedule import CosineSchedule

MASK, TEXT = 4, 4
CPU = torch.device("cpu")
PROCESS = AbsorbingProcess(mask_id=MASK)
LAWS = np.random.default_rng(0).dirichlet(np.full(TEXT, 0.6), size=12)  # one for each place of a row


class ByPlace:
    """Knows each place's law, to the power of `boast`; its logit of the mask is nonsense."""

    def __init__(self, boast: float = 1.0) -> None:
        laws = LAWS**boast
        self.laws = laws / laws.sum(1, keepdims=True)
        self.asked: list[dict] = []

    def __call__(self, ids, *, read, **options):
        self.asked.append({"ids": ids.numpy(), "read": read.numpy(), **options})
        logits = torch.full((len(LAWS), TEXT + 1), 7.0)
        logits[:, :TEXT] = torch.from_numpy(np.log(self.laws)).float()
        return logits[read.nonzero()[:, 1]]


def rows_of(rows: int, seed: int) -> np.ndarray:
    draws = np.random.default_rng(seed).random((rows, len(LAWS)))
    return (draws[..., None] > LAWS.cumsum(1)[None, :, :-1]).sum(-1)


def score(denoiser, x0, *, rate=0.5, seed=1, ids=None, counted=None, process=PROCESS, **options) -> CalibrationScores:
    every = np.ones(x0.shape, bool)
    rows = HeldoutRows(
        x0, every if counted is None else counted, np.arange(len(x0)) if ids is None else ids, is_real=every
    )
    return score_calibration(denoiser, process, rows, rate=rate, seed=seed, device=CPU, **options)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_an_oracle_is_calibrated_in_every_bin_and_shows_no_more_error_than_chance_makes(rate):
    found = summarize_calibration(score(ByPlace(), rows_of(4000, 2), rate=rate))
    assert len(found.bins) >= 4
    for one in found.bins:
        assert one.low <= one.confidence.value < one.high
        assert abs(one.accuracy.value - one.confidence.value) < 4 * one.accuracy.standard_error
    assert sum(one.tokens for one in found.bins) == found.tokens
    assert abs(found.tokens / (4000 * 12 * rate) - 1) < 0.05
    p = LAWS.max(1).mean()
    assert abs(found.accuracy.value - p) < 4 * found.accuracy.standard_error
    assert abs(found.confidence.value - p) < 4 * found.confidence.standard_error + 1e-3
    brier = 1 - (LAWS**2).sum(1).mean()
    assert abs(found.brier.value - brier) < 4 * found.brier.standard_error
    assert found.expected_error.value < 3 * found.expected_error_by_chance


@pytest.mark.parametrize("boast", [0.5, 2.5])
def test_who_boasts_or_doubts_is_told_by_how_much(boast):
    """The gap of each bin is known from the laws; a bin's tokens stand at known places."""
    denoiser = ByPlace(boast)
    found = summarize_calibration(score(denoiser, rows_of(6000, 3)))
    sure, guess = denoiser.laws.max(1), denoiser.laws.argmax(1)
    right = LAWS[np.arange(len(LAWS)), guess]
    place_bin = np.minimum((sure * 10).astype(int), 9)
    gaps = [abs((right - sure)[place_bin == k].sum()) for k in range(10)]
    expected = sum(gaps) / len(LAWS)
    assert expected > 0.1
    assert abs(found.expected_error.value - expected) < 4 * found.expected_error.standard_error
    assert found.expected_error.value > 10 * found.expected_error_by_chance
    brier = (1 - 2 * (LAWS * denoiser.laws).sum(1) + (denoiser.laws**2).sum(1)).mean()
    assert abs(found.brier.value - brier) < 4 * found.brier.standard_error
    assert found.brier.value > 1 - (LAWS**2).sum(1).mean(), "the Brier score is proper"


@pytest.mark.long
def test_error_bars_and_the_error_by_chance_are_what_repeating_shows():
    boaster, oracle = ByPlace(2.5), ByPlace()
    repeats = [rows_of(150, seed) for seed in range(300)]
    found = [summarize_calibration(score(boaster, x0, seed=i)) for i, x0 in enumerate(repeats)]
    for of in (lambda one: one.expected_error, lambda one: one.brier, lambda one: one.accuracy):
        spread = np.std([of(one).value for one in found])
        assert abs(np.mean([of(one).standard_error for one in found]) / spread - 1) < 0.2
    perfect = [summarize_calibration(score(oracle, x0, seed=i)) for i, x0 in enumerate(repeats)]
    shown = np.mean([one.expected_error.value for one in perfect])
    assert shown > 0.01
    assert abs(np.mean([one.expected_error_by_chance for one in perfect]) / shown - 1) < 0.15


def test_the_error_s_error_is_that_of_leaving_out_each_row():
    """Rows of many and of few hidden tokens."""
    x0 = rows_of(25, 9)
    counted = np.random.default_rng(10).random(x0.shape) < np.linspace(0.05, 1, 25)[:, None]
    scores = score(ByPlace(2.5), x0, counted=counted)
    names = ("tokens", "hits", "confidence", "brier")
    kept = np.flatnonzero(scores.tokens.sum(1))
    without = []
    for row in kept:
        rest = replace(scores, **{name: np.delete(getattr(scores, name), row, axis=0) for name in names})
        without.append(summarize_calibration(rest).expected_error.value)
    spread = ((np.array(without) - np.mean(without)) ** 2).sum()
    found = summarize_calibration(scores).expected_error
    assert found.rows == len(kept)
    assert found.standard_error == pytest.approx(math.sqrt(spread * (len(kept) - 1) / len(kept)))


def test_a_row_s_sums_do_not_depend_on_the_batch_and_parts_join():
    x0, ids = rows_of(20, 4), np.arange(30, 50)
    whole = score(ByPlace(), x0, ids=ids)
    parts = [score(ByPlace(), x0[part], ids=ids[part]) for part in (slice(0, 3), slice(3, 4), slice(4, 20))]
    joined = parts[0].joined(parts[1]).joined(parts[2])
    for name in ("tokens", "hits", "confidence", "brier"):
        assert np.array_equal(getattr(whole, name), getattr(joined, name))
    assert not np.array_equal(whole.tokens, score(ByPlace(), x0, ids=ids + 1).tokens)
    assert not np.array_equal(whole.tokens, score(ByPlace(), x0, ids=ids, seed=2).tokens)


def test_masks_are_nested_hide_counted_tokens_alone_and_only_masks_are_asked():
    x0 = rows_of(200, 5)
    counted = np.random.default_rng(6).random(x0.shape) < 0.7
    before = np.zeros(x0.shape, bool)
    for rate in (0.1, 0.3, 0.8, 1.0):
        denoiser = ByPlace()
        score(denoiser, x0, rate=rate, counted=counted)
        [asked] = denoiser.asked
        hidden = asked["ids"] == MASK
        assert np.array_equal(asked["read"], hidden)
        assert not (hidden & ~counted).any()
        assert not (before & ~hidden).any()
        assert np.array_equal(asked["ids"][~hidden], x0[~hidden])
        assert abs(hidden.sum() / counted.sum() - rate) < 0.05
        before = hidden
    assert np.array_equal(before, counted)


@pytest.mark.parametrize("pattern", [CAUSAL, AttentionPattern("block_diffusion", 4)])
def test_other_patterns_are_asked_for_the_same_tokens_through_their_own_training_pass(pattern):
    x0 = rows_of(30, 7)
    full, other = ByPlace(), ByPlace()
    same = score(full, x0)
    again = score(other, x0, pattern=pattern)
    assert other.asked[0]["pattern"] == pattern
    assert np.array_equal(other.asked[0]["read"], full.asked[0]["read"])
    assert np.array_equal(same.hits, again.hits)
    shown = other.asked[0]["ids"]
    if pattern == CAUSAL:
        assert np.array_equal(shown[:, 1:], x0[:, :-1])
        assert (shown[:, 0] == MASK).all()
    else:
        assert np.array_equal(shown, np.concatenate([full.asked[0]["ids"], x0], axis=1))


def test_a_timed_denoiser_is_told_when_so_much_is_hidden():
    process = AbsorbingProcess(mask_id=MASK, schedule=CosineSchedule())
    denoiser = ByPlace()
    score(denoiser, rows_of(3, 8), rate=0.3, process=process, is_timed=True)
    t = denoiser.asked[0]["t"].double()
    assert process.mixture(t).keep.numpy() == pytest.approx(np.full((3, len(LAWS)), 0.7))
    assert denoiser.asked[0]["pattern"] == FULL


def test_certainty_is_in_the_last_bin_and_nothing_hidden_gives_nothing():
    sure = torch.tensor([50.0, 0, 0, 0, 60.0])
    x0 = np.zeros((4, 6), np.int64)
    scores = score(lambda ids, *, read, **_: sure.expand(int(read.sum()), 5), x0, rate=1.0)
    found = summarize_calibration(scores)
    [one] = found.bins
    assert (one.high, found.accuracy.value, found.expected_error.value) == (1.0, 1.0, pytest.approx(0, abs=1e-12))
    assert found.brier.value == pytest.approx(0, abs=1e-12)
    assert one.accuracy.low < 0.6, "four rows prove little"
    assert math.isclose(found.confidence.value, 1.0)
    assert summarize_calibration(score(ByPlace(), rows_of(4, 1), counted=np.zeros((4, 12), bool))) is None
