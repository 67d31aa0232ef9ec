"""An error bar is what repeating shows, and an interval holds the truth as often as it says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllm_core.estimate import Estimate, jackknife, measure_seed, proportion, ratio


def clustered(rng: np.random.Generator, rows: int, p: float, alike: float) -> tuple[np.ndarray, np.ndarray]:
    """(hits, trials): with chance `alike` all of a row are right or wrong together; p is the chance of a hit."""
    trials = rng.integers(1, 12, rows)
    together = rng.random(rows) < alike
    own = rng.binomial(trials, p)
    return np.where(together, trials * (rng.random(rows) < p), own), trials


def test_ratio_is_of_the_sums_and_its_error_the_spread_that_repeating_shows():
    rng = np.random.default_rng(0)
    found = [ratio(*clustered(rng, 200, 0.3, 0.5)) for _ in range(2000)]
    values = np.array([one.value for one in found])
    errors = np.array([one.standard_error for one in found])
    assert abs(values.mean() - 0.3) < 4 * values.std() / math.sqrt(2000)
    assert abs(errors.mean() / values.std() - 1) < 0.06
    naive = math.sqrt(0.3 * 0.7 / (200 * 6))
    assert naive < 0.6 * values.std(), "tokens of a row are not independent here"


def test_rows_of_one_document_are_one_unit_and_alone_would_make_the_error_too_small():
    """Documents of one to forty rows, each with a level of its own."""
    rng = np.random.default_rng(0)
    of_documents, of_rows = [], []
    for _ in range(1000):
        documents = np.repeat(np.arange(40), rng.integers(1, 41, 40))
        nats = (3 + 0.5 * rng.standard_normal(40))[documents] + 0.5 * rng.standard_normal(len(documents))
        of_documents.append(ratio(nats, np.ones(len(nats)), documents))
        of_rows.append(ratio(nats, np.ones(len(nats))))
    assert [one.value for one in of_documents] == pytest.approx([one.value for one in of_rows])
    spread = np.std([one.value for one in of_rows])
    assert abs(np.mean([one.standard_error for one in of_documents]) / spread - 1) < 0.1
    assert np.mean([one.standard_error for one in of_rows]) < 0.35 * spread
    assert {one.rows for one in of_documents} == {40}


def test_a_share_of_one_document_s_rows_has_no_spread_and_the_interval_of_one_trial():
    hits, trials = np.array([3, 0, 4]), np.full(3, 4)
    assert proportion(hits, trials, [0, 0, 5]) == proportion([3, 4], [8, 4])
    found = proportion(hits, trials, [7, 7, 7])
    assert (found.standard_error, found.rows) == (None, 1)
    assert found.high - found.low > 0.8


@pytest.mark.parametrize("p", [0.0, 0.005, 0.05, 0.5, 0.98, 1.0])
@pytest.mark.parametrize("alike", [0.0, 1.0])
def test_an_interval_holds_the_truth_in_95_of_100_cases(p, alike):
    rng = np.random.default_rng(1)
    found = [proportion(*clustered(rng, 150, p, alike)) for _ in range(1000)]
    held = np.mean([one.low <= p <= one.high for one in found])
    assert held > 0.9
    assert all(0 <= one.low <= one.value <= one.high <= 1 for one in found)
    assert all(one.high - one.low > 0.005 for one in found), "certainty is never reached"


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12))
def test_rows_without_trials_take_no_part(pairs):
    hits, trials = np.array([(min(pair), max(pair)) for pair in pairs]).T
    if not trials.any():
        with pytest.raises(ValueError, match="counted"):
            proportion(hits, trials)
        return
    found = proportion(hits, trials)
    assert found == proportion(hits[trials > 0], trials[trials > 0])
    assert found.value == pytest.approx(hits.sum() / trials.sum())
    assert found.rows == (trials > 0).sum()
    assert (found.standard_error is None) == (found.rows == 1)


def test_the_jackknife_of_a_mean_is_the_textbook_error():
    values = np.random.default_rng(2).gamma(1.0, size=50)
    without = (values.sum() - values) / 49
    found = jackknife(values.mean(), without)
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(50))
    assert ratio(values, np.ones(50)).standard_error == pytest.approx(found.standard_error)
    assert jackknife(1.0, without[:1]) == Estimate(1.0, None, 1)


def test_two_measures_and_two_seeds_have_different_keys():
    keys = {measure_seed(seed, measure) for seed in range(50) for measure in ("infill", "calibration", "sudoku")}
    assert len(keys) == 150
    assert all(0 <= key < 1 << 64 for key in keys)
