"""Laws of the held-out figures: right in the mean, with errors that are what repeating them would show."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import in_long
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.evaluation.estimators import ExactCount, HeldoutRows, StratifiedTime, crowded
from dllm_core.evaluation.likelihood import (
    Likelihood,
    RowScores,
    bits_per_byte,
    estimate,
    score_rows,
    side_by_side,
    summarize,
    without_likelihood,
)
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.schedule import CosineSchedule, LogLinearSchedule
from dllm_core.noise.uniform import UniformProcess

MASK = 4
LAW = np.array([0.5, 0.25, 0.15, 0.1])
CPU = torch.device("cpu")
MASKS = {
    "linear": StratifiedTime(AbsorbingProcess(mask_id=MASK), CPU),
    "cosine": StratifiedTime(AbsorbingProcess(mask_id=MASK, schedule=CosineSchedule()), CPU),
    "log-linear": StratifiedTime(AbsorbingProcess(mask_id=MASK, schedule=LogLinearSchedule(eps=0.3)), CPU),
    "chain": StratifiedTime(AbsorbingProcess(mask_id=MASK), CPU, steps=5),
    "blocks": StratifiedTime(AbsorbingProcess(mask_id=MASK), CPU, block_length=5),
    "count": ExactCount(MASK, CPU),
    "count-blocks": ExactCount(MASK, CPU, 5),
}
EVERY_MASK = pytest.mark.parametrize("name", MASKS)
REPLACING = [
    UniformProcess(mask_id=MASK, vocab_size=MASK + 1),
    UniformProcess(mask_id=MASK, vocab_size=MASK + 1, schedule=CosineSchedule()),
    UniformProcess(mask_id=MASK, vocab_size=MASK + 1, schedule=LogLinearSchedule(eps=0.2)),
    HybridProcess(mask_id=MASK, vocab_size=MASK + 1, p_u=0.2, gamma=1),
]
BYTES = np.array([1, 2, 3, 0, 0])


def denoiser_of(law: np.ndarray):
    """A denoiser that answers with one law everywhere; its mask logit is nonsense, which no score may notice."""
    logits = torch.tensor([*np.log(law), 3.0], dtype=torch.float32)
    return lambda input_ids, *, read, **told: logits.expand(int(read.sum()), len(logits))


def rows_of(law: np.ndarray, rows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(len(law), p=law, size=(rows, length))


def score(denoiser, x0, *, by="linear", counted=None, ids=None, seed=1, draws=4, estimator=None) -> RowScores:
    every = np.ones(x0.shape, bool)
    rows = HeldoutRows(
        x0, every if counted is None else counted, np.arange(len(x0)) if ids is None else ids, is_real=every
    )
    return score_rows(denoiser, estimator or MASKS[by], rows, seed=seed, draws=draws)


def summarized(scores: RowScores, counts: np.ndarray) -> Likelihood:
    return summarize(scores, counts, BYTES, "some")


def counts_of(x0: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    return np.bincount(x0.ravel() if counted is None else x0[counted], minlength=MASK + 1)


@EVERY_MASK
@pytest.mark.parametrize("draws", [4, *in_long(1)])
def test_an_oracle_denoiser_pays_the_entropy_in_the_mean(name, draws):
    x0 = rows_of(LAW, 96_000 // draws, 16, seed=0)
    found = summarized(score(denoiser_of(LAW), x0, by=name, draws=draws), counts_of(x0))
    entropy = -float((LAW * np.log(LAW)).sum())
    assert found.standard_error < 0.006 * entropy  # small enough to see a weight that was clipped at 20
    assert abs(found.nelbo - entropy) < 4 * found.standard_error


@pytest.mark.parametrize("process", REPLACING, ids=str)
@pytest.mark.parametrize("steps", [3, *in_long(None)])
def test_an_oracle_pays_the_entropy_where_tokens_are_replaced(process, steps):
    """A token that looks clean costs nats too: only all positions together pay the whole entropy."""
    x0 = rows_of(LAW, 24_000, 16, seed=0)
    found = summarized(score(denoiser_of(LAW), x0, estimator=StratifiedTime(process, CPU, steps=steps)), counts_of(x0))
    entropy = -float((LAW * np.log(LAW)).sum())
    assert found.standard_error < 0.025 * entropy  # tokens that look clean pay more than 10 of these
    assert abs(found.nelbo - entropy) < 4 * found.standard_error


@EVERY_MASK
def test_a_wrong_denoiser_pays_the_cross_entropy_and_a_uniform_one_log_of_its_choices(name):
    x0 = rows_of(LAW, 3000, 16, seed=1)
    for law in (np.full(4, 0.25), LAW[::-1]):
        found = summarized(score(denoiser_of(law), x0, by=name), counts_of(x0))
        expected = -float((LAW * np.log(law)).sum())
        assert found.standard_error < 0.015 * expected
        assert abs(found.nelbo - expected) < 4 * found.standard_error + 1e-6


@EVERY_MASK
def test_the_estimate_of_given_rows_is_their_own_code_length_in_the_mean(name):
    """Over seeds: rows are fixed, so only times and noise vary."""
    x0 = rows_of(LAW, 6, 5, seed=2)
    repeats = 4000
    drawn = score(denoiser_of(LAW), np.tile(x0, (repeats, 1)), by=name, draws=2).nats.reshape(repeats, 6)
    exact = -np.log(LAW)[x0].sum(1)
    error = drawn.std(0, ddof=1) / math.sqrt(repeats)
    assert (error < 0.05 * exact).all()
    assert (abs(drawn.mean(0) - exact) < 4 * error).all()


@EVERY_MASK
def test_tokens_that_do_not_count_neither_cost_nor_count(name):
    x0 = rows_of(LAW, 50, 12, seed=3)
    counted = np.random.default_rng(4).random(x0.shape) < 0.5
    scores = score(denoiser_of(LAW), x0, by=name, counted=counted)
    changed = np.where(counted, x0, (x0 + 1) % 4)
    again = score(denoiser_of(LAW), changed, by=name, counted=counted)
    assert np.array_equal(scores.nats, again.nats)
    assert np.array_equal(scores.tokens, counted.sum(1))
    assert (scores.nats[counted.sum(1) > 2] > 0).mean() > 0.9


def by_masks(input_ids, *, read, **told):
    """Exact in any batch, and yet a function of the row: the law depends on how many masks the row holds."""
    table = torch.randn(40, MASK + 1, generator=torch.Generator().manual_seed(0))
    return table[(input_ids == MASK).sum(1)][read.nonzero()[:, 0]]


@EVERY_MASK
@pytest.mark.parametrize("size", [1, 3, 7, 20])
def test_a_rows_score_does_not_depend_on_the_batch_it_is_in(name, size):
    x0, ids = rows_of(LAW, 20, 9, seed=5), np.arange(100, 120)
    whole = score(by_masks, x0, by=name, ids=ids)
    order = np.random.default_rng(6).permutation(20)
    for start in range(0, 20, size):
        part = order[start : start + size]
        found = score(by_masks, x0[part], by=name, ids=ids[part])
        for field in ("nats", "variance", "tokens"):
            assert np.array_equal(getattr(found, field), getattr(whole, field)[part])


@EVERY_MASK
def test_another_row_id_and_another_seed_draw_other_noise(name):
    x0 = np.tile(rows_of(LAW, 1, 30, seed=7), (50, 1))
    scores = score(denoiser_of(LAW), x0, by=name).nats
    assert len(set(scores)) == 50
    assert not np.isin(scores, score(denoiser_of(LAW), x0, by=name, seed=2).nats).any()


class Recorded(AbsorbingProcess):
    """Keeps the times that it is given."""

    def corrupt(self, x0, t, u, v=None):
        SEEN.append(t)
        return super().corrupt(x0, t, u, v)


SEEN: list[np.ndarray] = []


@pytest.mark.parametrize("block_length", [None, 2])
@pytest.mark.parametrize("draws", [1, 3, 8])
def test_a_row_or_block_has_one_time_in_each_stratum(draws, block_length):
    SEEN.clear()
    estimator = StratifiedTime(Recorded(mask_id=MASK), CPU, block_length=block_length)
    score(denoiser_of(LAW), rows_of(LAW, 500, 4, seed=8), estimator=estimator, draws=draws)
    times = np.stack(SEEN)  # [draws N L]
    units = times.reshape(draws, 500, 1 if block_length is None else 2, -1)
    assert (units == units[..., :1]).all()
    if block_length is not None:
        assert (units[:, :, 0, 0] != units[:, :, 1, 0]).all()
    assert ((times > 0) & (times <= 1)).all()
    for t in np.moveaxis(units[..., 0].astype(np.float64), -1, 0):
        share = 0.75 * t + 0.25 * np.cbrt(t)  # of all times, those up to t
        strata = np.ceil(share * draws - 1e-6)
        assert (np.sort(strata, axis=0) == np.arange(1, draws + 1)[:, None]).all()
        within = share * draws - strata + 1
        assert (abs(np.quantile(within, [0.25, 0.5, 0.75], axis=1) - [[0.25], [0.5], [0.75]]) < 0.1).all()


def test_crowded_times_are_weighed_by_their_own_density():
    """The weight is dt/dshare, so that a mean over shares is an integral over t."""
    share = np.linspace(0, 1, 4001)[:-1]
    t, weight = crowded(share)
    assert (np.diff(t) < 0).all()
    assert t[0] == 1
    assert t[-1] > 0
    middle = share[:-1] + 1 / 8000
    np.testing.assert_allclose(np.diff(t) * -4000, crowded(middle)[1], rtol=0.05)
    for power in (0.0, 0.5, 1.0, 3.0):
        assert (weight * t**power).mean() == pytest.approx(1 / (power + 1), rel=1e-3)
    assert (crowded(np.array([1 - 2.0**-32]))[0] > 0).all()


@pytest.mark.parametrize("draws", [1, 3, 8, 20])
@pytest.mark.parametrize("block_length", [None, 4])
def test_exactly_so_many_are_masked_each_number_as_often_and_each_token(draws, block_length):
    """n = 8 counted tokens of 10, or 4 and 4 of two blocks; over draws and rows, k is even over 1 to n."""
    shown: list[np.ndarray] = []

    def seen(input_ids, *, read, **told):
        shown.append(read.numpy())
        return torch.zeros(int(read.sum()), MASK + 1)

    x0 = rows_of(LAW, 2400 // draws, 10, seed=9)
    counted = np.broadcast_to(np.arange(10) < 8, x0.shape)
    scores = score(seen, x0, counted=counted, estimator=ExactCount(MASK, CPU, block_length), draws=draws)
    np.testing.assert_allclose(scores.nats, 8 * math.log(4), rtol=1e-6)  # equal costs: no spread at all
    masks = np.stack(shown)[..., :8].reshape(draws, len(x0), -1, 8 if block_length is None else 4)
    n, k = masks.shape[-1], masks.sum(-1)
    assert not np.stack(shown)[..., 8:].any()
    counts = np.bincount(k.ravel(), minlength=n + 1)
    assert counts[0] == 0
    share = k.size / n
    assert (abs(counts[1:] - share) < 5 * np.sqrt(share)).all()
    if draws % n == 0:
        assert (np.sort(k, axis=0).reshape(n, draws // n, -1) == np.arange(1, n + 1)[:, None, None]).all()
    of_token = masks.reshape(-1, n).mean(0)
    assert (abs(of_token - (n + 1) / (2 * n)) < 0.05).all()


@EVERY_MASK
@pytest.mark.parametrize("ragged", [False, True])
def test_the_standard_error_is_the_spread_that_repeating_shows(name, ragged):
    """New rows and new noise each time; with ragged rows the figure is a ratio of two random sums."""
    repeats = 300
    x0, rng = rows_of(LAW, 60 * repeats, 16, seed=1000), np.random.default_rng(0)
    counted = np.arange(16) < (rng.integers(1, 17, (len(x0), 1)) if ragged else 16)
    scores = score(denoiser_of(LAW), x0, by=name, counted=np.broadcast_to(counted, x0.shape))
    found = [summarized(part, counts_of(x0)) for part in shared_out(scores, repeats)]
    spread = np.std([one.nelbo for one in found], ddof=1)
    told = math.sqrt(np.mean([one.standard_error**2 for one in found]))
    assert 0.82 < told / spread < 1.2


def shared_out(scores: RowScores, parts: int) -> list[RowScores]:
    """Equal numbers of rows, in order."""
    split = [np.split(getattr(scores, name), parts) for name in ("nats", "variance", "tokens")]
    return [RowScores(*fields, scores.draws) for fields in zip(*split, strict=True)]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=8).filter(any))
def test_the_unigram_entropy_is_that_of_the_counts(counts):
    scores = RowScores(np.array([3.0, 5.0]), np.array([0.04, 0.12]), np.array([2, 2]), 3)
    found = summarize(scores, np.array(counts), np.ones(len(counts), int), "some")
    total = sum(counts)
    assert found.unigram_entropy == pytest.approx(sum(-n / total * math.log(n / total) for n in counts if n), abs=1e-12)
    assert found.gain == found.unigram_entropy - found.nelbo
    assert (found.nelbo, found.rows, found.tokens, found.draws, found.estimator) == (2.0, 2, 4, 3, "some")
    assert found.standard_error == pytest.approx(0.5)  # two rows at 1.5 and 2.5 nats a token
    assert found.monte_carlo_error == pytest.approx(0.1)  # the root of 0.16 nats^2, over 4 tokens
    nothing = without_likelihood(2, np.array(counts), np.ones(len(counts), int))
    assert (nothing.nelbo, nothing.standard_error, nothing.gain, nothing.estimator) == (None, None, None, None)
    assert (nothing.unigram_entropy, nothing.rows, nothing.tokens) == (found.unigram_entropy, 2, total)


@EVERY_MASK
@pytest.mark.parametrize("draws", [2, 5])
def test_the_monte_carlo_error_is_the_spread_over_seeds_of_the_same_rows_or_a_little_more(name, draws):
    """The rows stay, their ids do not; the error also holds how neighbouring strata differ."""
    x0, repeats = rows_of(LAW, 12, 15, seed=11), 400
    scores = score(by_masks, np.tile(x0, (repeats, 1)), by=name, draws=draws)
    found = [summarized(part, counts_of(x0)) for part in shared_out(scores, repeats)]
    spread = np.std([one.nelbo for one in found], ddof=1)
    told = math.sqrt(np.mean([one.monte_carlo_error**2 for one in found]))
    assert 0.88 < told / spread < 3.5


def test_one_draw_has_no_monte_carlo_error_and_so_it_is_not_told():
    x0 = rows_of(LAW, 12, 15, seed=11)
    found = summarized(score(by_masks, x0, draws=1), counts_of(x0))
    assert found.monte_carlo_error is None
    assert found.standard_error > 0


def adaptive(x0, target, draws, sizes=(4, 8), seen=None) -> RowScores:
    """Scored in parts, as workers do."""
    bounds = [0, *sizes, len(x0)]

    def rounds(first: int, number: int) -> RowScores:
        if seen is not None:
            seen.append((first, number))
        parts = []
        for start, stop in itertools.pairwise(bounds):
            every = np.ones(x0[start:stop].shape, bool)
            rows = HeldoutRows(x0[start:stop], every, np.arange(start, stop), every)
            parts.append(score_rows(by_masks, MASKS["count"], rows, seed=3, draws=number, first=first))
        return side_by_side(parts)

    return estimate(rounds, draws, target)


def test_draws_end_where_the_error_is_small_enough_and_never_go_beyond_what_is_allowed():
    x0 = rows_of(LAW, 20, 15, seed=12)
    used = []
    for target in (10.0, 0.2, 0.1, 0.05, 1e-9):
        seen: list[tuple[int, int]] = []
        scores = adaptive(x0, target, 41, seen=seen)
        assert scores.draws == sum(number for _, number in seen)
        assert [first for first, _ in seen] == [sum(n for _, n in seen[:i]) for i in range(len(seen))]
        assert scores.monte_carlo_error <= target or scores.draws == 41
        used.append(scores.draws)
    assert used == sorted(used)
    assert used[0] < 10 < used[-1] == 41
    assert adaptive(x0, None, 7).draws == 7
    assert adaptive(x0, 1e-9, 3).draws == 3


def test_where_draws_end_does_not_depend_on_how_rows_are_shared_out():
    x0 = rows_of(LAW, 20, 15, seed=12)
    whole = adaptive(x0, 0.1, 40, sizes=())
    for sizes in ((1,), (3, 4, 17), (10,)):
        parts = adaptive(x0, 0.1, 40, sizes=sizes)
        assert parts.draws == whole.draws < 40
        assert np.array_equal(parts.nats, whole.nats)
        assert np.array_equal(parts.variance, whole.variance)


def test_rounds_are_together_what_their_draws_are():
    """The mean and its variance over all draws, each draw alike, rounds of unequal size too."""
    x0, seen = rows_of(LAW, 20, 15, seed=12), []
    together = adaptive(x0, 1e-9, 11, seen=seen)
    every = np.ones(x0.shape, bool)
    rows = HeldoutRows(x0, every, np.arange(20), every)
    parts = [score_rows(by_masks, MASKS["count"], rows, seed=3, draws=n, first=first) for first, n in seen]
    assert sorted({n for _, n in seen}) == [5, 6]
    again = score_rows(by_masks, MASKS["count"], rows, seed=3, draws=seen[0][1], first=seen[1][0])
    assert (again.nats != parts[0].nats).mean() > 0.5  # a round draws anew
    # Two rounds are surer than either: the target is asked of all draws together.
    target = 1.001 * together.monte_carlo_error
    assert target < min(part.monte_carlo_error for part in parts)
    assert adaptive(x0, target, 44).draws < 20
    np.testing.assert_allclose(together.nats, sum(p.nats * p.draws for p in parts) / 11)
    np.testing.assert_allclose(together.variance, sum(p.variance * p.draws**2 for p in parts) / 121)


@given(st.floats(0.1, 20), st.integers(1, 1000), st.integers(1, 9000))
def test_bits_per_byte_are_bits_of_all_tokens_over_their_bytes(nats, tokens, num_bytes):
    assert bits_per_byte(nats, tokens, num_bytes) * num_bytes * math.log(2) == pytest.approx(nats * tokens)
    assert bits_per_byte(nats, tokens, 0) is None


def test_bits_per_byte_count_the_bytes_of_counted_tokens():
    x0 = rows_of(LAW, 50, 12, seed=3)
    counted = np.random.default_rng(4).random(x0.shape) < 0.5
    found = summarized(score(denoiser_of(LAW), x0, counted=counted), counts_of(x0, counted))
    assert found.bytes == BYTES[x0[counted]].sum()
    assert found.bits_per_byte == pytest.approx(found.nelbo * counted.sum() / math.log(2) / found.bytes)


def test_the_error_of_the_figure_is_that_of_every_ratio_over_rows():
    """Rows without a counted token say nothing of how rows differ; a single row has no spread."""
    scores = RowScores(np.array([3.0, 5.0, 0.0]), np.zeros(3), np.array([2, 2, 0]), 1)
    found = summarized(scores, np.array([4, 0, 0, 0, 0]))
    assert (found.nelbo, found.standard_error, found.rows) == (2.0, pytest.approx(0.5), 3)
    alone = RowScores(np.array([3.0]), np.zeros(1), np.array([2]), 1)
    assert summarized(alone, np.array([2, 0, 0, 0, 0])).standard_error is None
