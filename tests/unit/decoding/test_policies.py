"""Laws of policies: who is chosen, how many, and that drawn positions have their law."""

import itertools
import math

import numpy as np
import pytest
from conftest import draws
from hypothesis import given
from hypothesis import strategies as st
from rows import policies

from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.unmask import (
    EntropyPolicy,
    FactorPolicy,
    LowConfidencePolicy,
    MarginPolicy,
    RandomPolicy,
    ThresholdPolicy,
)

scores = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=12).map(lambda x: np.array(x, np.float32))


def uniforms_of(number: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(number).astype(np.float32)


@given(policy=policies, score=scores, data=st.data())
def test_a_policy_commits_its_quota_at_least(policy, score, data):
    quota = data.draw(st.integers(0, len(score)))
    chosen = policy.choose(score, quota, uniforms_of(len(score)))
    assert chosen.dtype == bool
    assert chosen.sum() >= quota


@given(policy=policies.filter(lambda p: getattr(p, "position_temperature", 0) == 0), score=scores, data=st.data())
def test_whoever_is_passed_over_is_no_surer_than_who_is_chosen(policy, score, data):
    u = uniforms_of(len(score))
    chosen = policy.choose(score, data.draw(st.integers(0, len(score))), u)
    by = u if isinstance(policy, RandomPolicy) else score
    if chosen.any() and not chosen.all():
        assert by[chosen].min() >= by[~chosen].max()


@given(score=scores, threshold=st.floats(0.01, 1))
def test_a_threshold_takes_exactly_those_that_reach_it_and_the_best_one(score, threshold):
    chosen = ThresholdPolicy(threshold=threshold).choose(score, 1, uniforms_of(len(score)))
    assert set(np.flatnonzero(chosen)) == {*np.flatnonzero(score >= threshold), int(score.argmax())}


@given(score=scores, factor=st.floats(0.05, 5), takes_last=st.booleans())
def test_a_factor_takes_as_many_as_its_theorem_allows(score, factor, takes_last):
    """By the published rule written out: the largest n with (n + 1)(1 - c_n) < factor, and the first in any case."""
    surest = sorted(score.astype(np.float64), reverse=True)
    allowed = [n for n in range(1, len(surest) + 1) if (n + 1) * (1 - surest[n - 1]) < factor]
    number = max([1, *allowed])
    if takes_last and number == len(surest) - 1:
        number += 1
    policy = FactorPolicy(factor=factor, takes_last=takes_last)
    assert policy.choose(score, 1, uniforms_of(len(score))).sum() == number


@pytest.mark.parametrize("kind", [LowConfidencePolicy, MarginPolicy, EntropyPolicy])
@pytest.mark.parametrize("quota", [1, 2, 3])
def test_drawn_positions_are_draws_without_replacement_by_their_softmax(kind, quota):
    """Against the law listed whole (Plackett-Luce): chances of every set of positions, chi-square at 0.1 %."""
    score, heat, number = np.array([0.9, 0.2, 0.6, 0.4], np.float32), 0.4, draws(40_000)
    weight = np.exp(score.astype(np.float64) / heat)
    law: dict[frozenset[int], float] = {}
    for order in itertools.permutations(range(4), quota):
        left, chance = weight.sum(), 1.0
        for at in order:
            chance *= weight[at] / left
            left -= weight[at]
        law[frozenset(order)] = law.get(frozenset(order), 0.0) + chance
    drawn = np.random.default_rng(1).random((number, 4)).astype(np.float32)
    policy = kind(position_temperature=heat)
    found = dict.fromkeys(law, 0)
    for u in drawn:
        found[frozenset(np.flatnonzero(policy.choose(score, quota, u)).tolist())] += 1
    assert sum(law.values()) == pytest.approx(1)
    chi2 = sum((found[which] - number * p) ** 2 / (number * p) for which, p in law.items())
    assert chi2 < len(law) - 1 + 5 * math.sqrt(2 * len(law))


@pytest.mark.parametrize("heat", [1e-30, 1e-39, 5e-324])
def test_a_position_temperature_that_is_hardly_any_takes_the_surest_as_none_does(heat):
    score, u = np.array([0.1, 0.5, 0.9], np.float32), np.array([0.9, 0.5, 0.1], np.float32)
    for number in (1, 2):
        chosen = LowConfidencePolicy(position_temperature=heat).choose(score, number, u)
        assert (chosen == LowConfidencePolicy().choose(score, number, u)).all()


@given(
    number=st.integers(1, 64),
    block=st.integers(1, 64),
    steps=st.integers(1, 64),
    quota=st.sampled_from(["even", "by_time"]),
)
def test_quotas_add_up_to_all_and_the_last_step_leaves_nothing(number, block, steps, quota):
    config = DecodeConfig(block_length=max(block, steps), steps_per_block=steps, quota=quota)
    left, taken = number, []
    for step in range(steps):
        taken.append(config.quota_of(left, step, steps))
        assert 0 <= taken[-1] <= left
        left -= taken[-1]
    assert left == 0
    if quota == "even":  # LLaDA's: n // steps each, and one more in the first n % steps
        assert taken == [number // steps + (step < number % steps) for step in range(steps)]


def test_by_time_is_the_share_between_two_even_times():
    """Dream's, from its published times: linspace(1, 1e-3, steps + 1), rounded down, the rest at the end."""
    config = DecodeConfig(block_length=32, steps_per_block=16, quota="by_time")
    times = np.linspace(1, 1e-3, 17)
    left = 32
    for step in range(16):
        expected = int(left * (1 - times[step + 1] / times[step])) if step < 15 else left
        assert config.quota_of(left, step, 16) == expected
        left -= expected
