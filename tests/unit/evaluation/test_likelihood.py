"""Laws of the held-out bound: right in the mean, with an error bar that is what repeating it would show."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.evaluation.likelihood import RowScores, score_rows, summarize
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.schedule import CosineSchedule, LinearSchedule
from dllm_core.noise.uniform import UniformProcess

MASK = 4
LAW = np.array([0.5, 0.25, 0.15, 0.1])
CPU = torch.device("cpu")
SCHEDULES = [LinearSchedule(), CosineSchedule()]
REPLACING = [
    UniformProcess(mask_id=MASK, vocab_size=MASK + 1),
    UniformProcess(mask_id=MASK, vocab_size=MASK + 1, schedule=CosineSchedule()),
    HybridProcess(mask_id=MASK, vocab_size=MASK + 1, p_u=0.2, gamma=1),
]


def denoiser_of(law: np.ndarray):
    """A denoiser that answers with one law everywhere; its mask logit is nonsense, which no score may notice."""
    logits = torch.tensor([*np.log(law), 3.0], dtype=torch.float32)
    return lambda input_ids, *, read: logits.expand(int(read.sum()), len(logits))


def rows_of(law: np.ndarray, rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(law), p=law, size=(rows, length))


def score(denoiser, x0, *, schedule=SCHEDULES[0], counted=None, ids=None, seed=1, draws=4, process=None) -> RowScores:
    return score_rows(
        denoiser,
        process or AbsorbingProcess(mask_id=MASK, schedule=schedule),
        x0,
        np.ones(x0.shape, bool) if counted is None else counted,
        np.arange(len(x0)) if ids is None else ids,
        seed=seed,
        draws=draws,
        device=CPU,
    )


def counts_of(x0: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    return np.bincount(x0.ravel() if counted is None else x0[counted], minlength=MASK + 1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("draws", [1, 4])
def test_an_oracle_denoiser_pays_the_entropy_in_the_mean(schedule, draws):
    x0 = rows_of(LAW, 96_000 // draws, 16, seed=0)
    found = summarize(score(denoiser_of(LAW), x0, schedule=schedule, draws=draws), counts_of(x0))
    entropy = -float((LAW * np.log(LAW)).sum())
    assert found.standard_error < 0.006 * entropy  # small enough to see a weight that was clipped at 20
    assert abs(found.nelbo - entropy) < 4 * found.standard_error


@pytest.mark.parametrize("process", REPLACING, ids=str)
def test_an_oracle_pays_the_entropy_where_tokens_are_replaced(process):
    """A token that looks clean costs nats too: only all positions together pay the whole entropy."""
    x0 = rows_of(LAW, 24_000, 16, seed=0)
    found = summarize(score(denoiser_of(LAW), x0, process=process), counts_of(x0))
    entropy = -float((LAW * np.log(LAW)).sum())
    assert found.standard_error < 0.025 * entropy  # tokens that look clean pay more than 10 of these
    assert abs(found.nelbo - entropy) < 4 * found.standard_error


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_wrong_denoiser_pays_the_cross_entropy_and_a_uniform_one_log_of_its_choices(schedule):
    x0 = rows_of(LAW, 3000, 16, seed=1)
    for law in (np.full(4, 0.25), LAW[::-1]):
        found = summarize(score(denoiser_of(law), x0, schedule=schedule), counts_of(x0))
        expected = -float((LAW * np.log(law)).sum())
        assert found.standard_error < 0.015 * expected
        assert abs(found.nelbo - expected) < 4 * found.standard_error


def test_the_estimate_of_given_rows_is_their_own_code_length_in_the_mean():
    """Over seeds: rows are fixed, so only times and noise vary."""
    x0 = rows_of(LAW, 6, 5, seed=2)
    repeats = 4000
    drawn = score(denoiser_of(LAW), np.tile(x0, (repeats, 1)), draws=2).nats.reshape(repeats, 6)
    exact = -np.log(LAW)[x0].sum(1)
    error = drawn.std(0, ddof=1) / math.sqrt(repeats)
    assert (error < 0.05 * exact).all()
    assert (abs(drawn.mean(0) - exact) < 4 * error).all()


def test_tokens_that_do_not_count_neither_cost_nor_count():
    x0 = rows_of(LAW, 50, 12, seed=3)
    counted = np.random.default_rng(4).random(x0.shape) < 0.5
    scores = score(denoiser_of(LAW), x0, counted=counted)
    changed = np.where(counted, x0, (x0 + 1) % 4)
    again = score(denoiser_of(LAW), changed, counted=counted)
    assert np.array_equal(scores.nats, again.nats)
    assert np.array_equal(scores.tokens, counted.sum(1))
    assert (scores.nats[counted.sum(1) > 2] > 0).mean() > 0.9


def by_masks(input_ids, *, read):
    """Exact in any batch, and yet a function of the row: the law depends on how many masks the row holds."""
    table = torch.randn(40, MASK + 1, generator=torch.Generator().manual_seed(0))
    return table[(input_ids == MASK).sum(1)][read.nonzero()[:, 0]]


@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_a_rows_score_does_not_depend_on_the_batch_it_is_in(size):
    x0, ids = rows_of(LAW, 20, 9, seed=5), np.arange(100, 120)
    whole = score(by_masks, x0, ids=ids)
    order = np.random.default_rng(6).permutation(20)
    for start in range(0, 20, size):
        part = order[start : start + size]
        assert np.array_equal(score(by_masks, x0[part], ids=ids[part]).nats, whole.nats[part])


def test_another_row_id_and_another_seed_draw_other_noise():
    x0 = np.tile(rows_of(LAW, 1, 30, seed=7), (50, 1))
    scores = score(denoiser_of(LAW), x0).nats
    assert len(set(scores)) == 50
    assert not np.isin(scores, score(denoiser_of(LAW), x0, seed=2).nats).any()


@pytest.mark.parametrize("draws", [1, 3, 8])
def test_a_row_has_one_time_in_each_stratum(draws):
    seen: list[np.ndarray] = []

    class Recorded(AbsorbingProcess):
        """Keeps the times that it is given."""

        def corrupt(self, x0, t, u, v=None):
            seen.append(t)
            return super().corrupt(x0, t, u, v)

    process = Recorded(mask_id=MASK)
    x0 = rows_of(LAW, 500, 3, seed=8)
    score_rows(denoiser_of(LAW), process, x0, x0 >= 0, np.arange(500), seed=1, draws=draws, device=CPU)
    times = np.stack(seen)  # [draws N L]
    assert (times == times[..., :1]).all()
    assert ((times > 0) & (times <= 1)).all()
    strata = np.ceil(times[..., 0].astype(np.float64) * draws)
    assert (np.sort(strata, axis=0) == np.arange(1, draws + 1)[:, None]).all()
    within = times[..., 0] * draws - strata + 1
    assert (abs(np.quantile(within, [0.25, 0.5, 0.75], axis=1) - [[0.25], [0.5], [0.75]]) < 0.1).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_standard_error_is_the_spread_that_repeating_shows(schedule, ragged):
    """New rows and new noise each time; with ragged rows the figure is a ratio of two random sums."""
    found = []
    for seed in range(200):
        x0 = rows_of(LAW, 60, 16, seed=1000 + seed)
        lengths = np.random.default_rng(seed).integers(1, 17, 60) if ragged else np.full(60, 16)
        counted = np.arange(16) < lengths[:, None]
        scores = score(denoiser_of(LAW), x0, schedule=schedule, counted=counted, seed=seed)
        found.append(summarize(scores, counts_of(x0, counted)))
    spread = np.std([one.nelbo for one in found], ddof=1)
    told = math.sqrt(np.mean([one.standard_error**2 for one in found]))
    assert 0.8 < told / spread < 1.25


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any))
def test_the_unigram_entropy_is_that_of_the_counts(counts):
    scores = RowScores(np.array([3.0, 5.0]), np.array([2, 2]))
    found = summarize(scores, np.array(counts))
    total = sum(counts)
    assert found.unigram_entropy == pytest.approx(sum(-n / total * math.log(n / total) for n in counts if n), abs=1e-12)
    assert found.gain == found.unigram_entropy - found.nelbo
    assert (found.nelbo, found.rows, found.tokens) == (2.0, 2, 4)
    assert found.standard_error == pytest.approx(0.5)  # two rows at 1.5 and 2.5 nats a token
