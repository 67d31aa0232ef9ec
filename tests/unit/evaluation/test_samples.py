"""Text that repeats itself is cheap, and it is told; figures are those of counting by hand."""

import math
from collections import Counter

import numpy as np
import pytest
from conftest import draws
from hypothesis import given, settings
from hypothesis import strategies as st

from dllm_core.evaluation.samples import Samples, measure_samples
from dllm_core.evaluation.scorers import NGramModel

VOCAB, MASK = 9, 0


class PerToken:
    """Costs a token's id in tenths of a nat, and twice that behind a token of the same id."""

    name = "by id"

    def nats(self, x0, is_real):
        cost = x0 / 10
        cost[:, 1:] += np.where(x0[:, 1:] == x0[:, :-1], x0[:, 1:] / 10, 0)
        return np.where(is_real, cost, 0.0)


token_lists = st.lists(st.integers(1, 4), max_size=7)


def entropy(tokens) -> float:
    counts = np.array(list(Counter(tokens).values())) / max(len(tokens), 1)
    return float(-(counts * np.log(counts)).sum())


def grams(tokens, n) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def without_each(statistic, rows) -> float:
    """The jackknife, by leaving out."""
    values = np.array([statistic(rows[:i] + rows[i + 1 :]) for i in range(len(rows))])
    return math.sqrt(((values - values.mean()) ** 2).sum() * (len(rows) - 1) / len(rows))


@settings(max_examples=draws(150), deadline=None)
@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=6))
def test_figures_are_those_of_counting_by_hand(pairs):
    prompts, answers = zip(*pairs, strict=True)
    samples = Samples.of(prompts, answers)
    found = measure_samples(samples, PerToken(), longest=3)
    full = [answer for answer in answers if answer]
    if not full:
        assert found is None
        return
    total = 0.0
    for prompt, answer in pairs:
        text = [*prompt, *answer]
        for i in range(len(prompt), len(text)):
            total += text[i] / 10 * (2 if i and text[i] == text[i - 1] else 1)
    tokens = sum(map(len, answers))
    assert (found.samples, found.tokens, found.scorer) == (len(pairs), tokens, "by id")
    assert found.nats.value == pytest.approx(total / tokens)
    assert found.perplexity.value == pytest.approx(math.exp(total / tokens))
    assert found.length.value == pytest.approx(tokens / len(pairs))
    flat = [token for answer in full for token in answer]
    assert found.entropy.value == pytest.approx(entropy(flat), abs=1e-12)
    assert found.entropy_within.value == pytest.approx(np.mean([entropy(answer) for answer in full]), abs=1e-12)
    if len(full) > 1:
        expected = without_each(lambda rows: entropy([t for row in rows for t in row]), full)
        assert found.entropy.standard_error == pytest.approx(expected, abs=1e-9)
    else:
        assert found.entropy.standard_error is None
    assert [one.n for one in found.distinct] == [n for n in (1, 2, 3) if any(len(a) >= n for a in answers)]
    for one in found.distinct:
        own = [grams(answer, one.n) for answer in full if len(answer) >= one.n]
        every = [gram for row in own for gram in row]
        assert one.overall.value == pytest.approx(len(set(every)) / len(every))
        assert one.within.value == pytest.approx(sum(len(set(row)) for row in own) / len(every))
        if len(own) > 1:
            share = lambda rows: len({g for row in rows for g in row}) / sum(map(len, rows))  # noqa: E731
            assert one.overall.standard_error == pytest.approx(without_each(share, own), abs=1e-9)


def markov(rows: int, width: int, seed: int) -> list[list[int]]:
    """Regular text over 1 to 8: each token likes its successor."""
    rng = np.random.default_rng(seed)
    text = rng.integers(0, 8, (rows, width))
    for i in range(1, width):
        text[:, i] = np.where(rng.random(rows) < 0.6, (text[:, i - 1] + 1) % 8, text[:, i])
    return (text + 1).tolist()


def test_one_who_repeats_is_cheaper_than_text_and_every_figure_beside_it_tells():
    train = np.array(markov(2000, 32, 0))
    train[:, ::3] = 1  # so that repeating 1 is likely
    scorer = NGramModel.fit(train, np.ones(train.shape, bool), order=1, vocab_size=VOCAB, never={MASK})
    prompts = [[1]] * 60
    text = measure_samples(Samples.of(prompts, np.array(markov(60, 32, 1)).tolist()), scorer)
    parrot = measure_samples(Samples.of(prompts, [[1] * 32] * 60), scorer)
    one_poem = measure_samples(Samples.of(prompts, [markov(1, 32, 2)[0]] * 60), scorer)
    each_his_own = measure_samples(Samples.of(prompts, [[1 + i % 8] * 32 for i in range(60)]), scorer)
    assert parrot.perplexity.value < 0.6 * text.perplexity.value
    assert parrot.entropy.value == parrot.entropy_within.value == 0
    assert each_his_own.entropy.value > 2, "all samples together hide it"
    assert each_his_own.entropy_within.value == 0
    assert one_poem.entropy_within.value > 1.5, "a single sample hides it"
    for n in (1, 2, 3):
        at = n - 1
        assert one_poem.distinct[at].overall.value < 0.4 * text.distinct[at].overall.value or n == 1
        assert parrot.distinct[at].overall.value < one_poem.distinct[at].overall.value
        assert each_his_own.distinct[at].within.value < 0.2 * text.distinct[at].within.value


def test_error_bars_are_what_repeating_shows():
    scorer = PerToken()
    found = [measure_samples(Samples.of([[1]] * 40, markov(40, 12, seed)), scorer) for seed in range(300)]
    for of in (
        lambda one: one.nats,
        lambda one: one.perplexity,
        lambda one: one.entropy_within,
        lambda one: one.distinct[1].within,
    ):
        spread = np.std([of(one).value for one in found])
        assert abs(np.mean([of(one).standard_error for one in found]) / spread - 1) < 0.25


def test_the_last_figure_over_one_sample_has_no_error_bar():
    found = measure_samples(Samples.of([[1, 2]], [[3, 4, 3]]), PerToken())
    estimates = [found.nats, found.entropy, found.entropy_within, found.length, found.perplexity]
    estimates += [part for one in found.distinct for part in (one.overall, one.within)]
    assert {one.standard_error for one in estimates} == {None}
    assert len(found.distinct) == 3


def test_samples_are_answers_behind_their_prompts():
    samples = Samples.of([(1, 2, 4), (), (5,)], [[6, 1, 2], [7], [8, 5]])
    found = [
        (ids[real & ~answer].tolist(), ids[answer].tolist())
        for ids, real, answer in zip(samples.ids, samples.is_real, samples.is_answer, strict=True)
    ]
    assert found == [([1, 2, 4], [6, 1, 2]), ([], [7]), ([5], [8, 5])]
