"""Quality of generated text: its nats under a stated scorer, and beside them how varied it is.

A model that repeats itself is cheap for every scorer (Zheng et al., arXiv:2409.02908), so no figure here
stands alone: measure the same continuations of held-out text too, and compare all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from dllm_core.estimate import Estimate, jackknife, ratio
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.evaluation.scorers import Scorer
from dllm_core.evaluation.writers import Tokens
from dllm_core.seeding import Bools, Doubles, Ints


@dataclass(frozen=True)
class Samples:
    """Rows of prompt and answer: ids int64 [N L]; is_real bool [N L]; is_answer bool [N L], what is to be judged."""

    ids: Ints
    is_real: Bools
    is_answer: Bools

    @classmethod
    def of(cls, prompts: Sequence[Tokens], answers: Sequence[Tokens]) -> Self:
        """One row a pair; filled up with id 0, which is not real."""
        heads = np.array([len(prompt) for prompt in prompts], np.int64)[:, None]
        stops = heads + np.array([len(answer) for answer in answers], np.int64)[:, None]
        index = np.arange(int(stops.max(initial=0)))
        is_real = index < stops
        ids = np.zeros(is_real.shape, np.int64)
        ids[is_real] = [token for pair in zip(prompts, answers, strict=True) for part in pair for token in part]
        return cls(ids, is_real, is_real & (index >= heads))


def openings(
    rows: HeldoutRows, size: int, *, context: int, end_id: int, opening: int | None = None
) -> tuple[list[Tokens], list[Tokens]]:
    """Prompts, and what the text of each goes on with: at most `size` tokens, up to the end token and without it.

    A prompt is what stands before a row's first counted token; of text without prompts, the first `opening` tokens of a
    row's first document (None: its first quarter). A row whose prompt leaves less than `size` of the context has none,
    nor has one whose document ends with it.
    """
    prompts: list[Tokens] = []
    texts: list[Tokens] = []
    for row in np.flatnonzero(rows.counted.any(1)):
        first = int(rows.counted[row].argmax())
        own = rows.is_real[row].copy()
        if rows.segment_ids is not None:
            own &= rows.segment_ids[row] == rows.segment_ids[row, first]
        at = np.flatnonzero(own)
        head = int((at < first).sum()) or (len(at) // 4 if opening is None else opening)
        if head + size > context or head >= len(at):
            continue
        ids = rows.x0[row, at]
        goes_on = rows.counted[row, at[head : head + size]] & (ids[head : head + size] != end_id)
        stop = head + int(goes_on.cumprod().sum())
        prompts.append(ids[:head].tolist())
        texts.append(ids[head:stop].tolist())
    return prompts, texts


@dataclass(frozen=True)
class Distinct:
    """n-grams that differ, as a share of all: over the samples together, and inside each of them in the mean.

    A share falls as a text gets longer: compare equal amounts only. Li et al., arXiv:1510.03055.
    """

    n: int
    overall: Estimate
    within: Estimate


@dataclass(frozen=True)
class TextQuality:
    """nats: a token, under `scorer`. Entropies are of the tokens that came out, nats.

    entropy: over all samples together; entropy_within: inside each sample, their mean (Zheng et al.'s sentence
    entropy). length: tokens a sample.
    """

    scorer: str
    samples: int
    tokens: int
    nats: Estimate
    entropy: Estimate
    entropy_within: Estimate
    distinct: tuple[Distinct, ...]
    length: Estimate

    @property
    def perplexity(self) -> Estimate:
        """Generative perplexity, exp(nats), its error to first order."""
        value = math.exp(self.nats.value)
        error = self.nats.standard_error
        return Estimate(value, None if error is None else value * error, self.nats.rows)


def measure_samples(samples: Samples, scorer: Scorer, *, longest: int = 4) -> TextQuality | None:
    """Judge the answers, each given its prompt; longest: of the n-grams counted. None where all answers are empty."""
    tokens = samples.is_answer.sum(1)
    if not tokens.any():
        return None
    nats = np.where(samples.is_answer, scorer.nats(samples.ids, samples.is_real), 0.0).sum(1)
    unigrams = _Counted.of(samples, 1)
    return TextQuality(
        scorer=scorer.name,
        samples=len(tokens),
        tokens=int(tokens.sum()),
        nats=ratio(nats, tokens),
        entropy=_entropy(unigrams),
        entropy_within=ratio(unigrams.row_entropies(), np.ones(int((tokens > 0).sum()))),
        distinct=tuple(
            _distinct(counted)
            for counted in (_Counted.of(samples, n) for n in range(1, longest + 1))
            if len(counted.rows)
        ),
        length=ratio(tokens, np.ones(len(tokens))),
    )


@dataclass(frozen=True)
class _Counted:
    """Which n-gram how often in which row: P pairs (row, gram), each int64 [P]; num_rows that hold one, num_grams."""

    n: int
    rows: Ints
    grams: Ints
    counts: Ints
    num_rows: int
    num_grams: int

    @classmethod
    def of(cls, samples: Samples, n: int) -> Self:
        """Of the answers' n-grams; rows without one are left out and the others numbered anew."""
        windows, none = np.lib.stride_tricks.sliding_window_view, np.empty(0, np.int64)
        if samples.ids.shape[1] < n or not (inside := windows(samples.is_answer, n, axis=1).all(-1)).any():
            return cls(n, none, none, none, 0, 0)
        _, grams = np.unique(windows(samples.ids, n, axis=1)[inside], axis=0, return_inverse=True)
        _, rows = np.unique(np.nonzero(inside)[0], return_inverse=True)
        pairs, counts = np.unique(np.stack([rows, grams.ravel()]), axis=1, return_counts=True)
        num_rows, num_grams = (int(part.max()) + 1 for part in pairs)
        return cls(n, pairs[0], pairs[1], counts, num_rows, num_grams)

    def per_row(self, values: Doubles | Ints) -> Doubles:
        """Sums of values [P] by row [num_rows]."""
        return np.bincount(self.rows, values, self.num_rows).astype(np.float64)

    def row_entropies(self) -> Doubles:
        """Entropy of each row's own grams [num_rows]."""
        totals = self.per_row(self.counts)
        return np.log(totals) - self.per_row(_n_log_n(self.counts)) / totals


def _n_log_n(counts: Doubles | Ints) -> Doubles:
    counts = np.asarray(counts, np.float64)
    weighted: Doubles = counts * np.log(np.maximum(counts, 1))
    return weighted


def _entropy(counted: _Counted) -> Estimate:
    """Log T - (1/T) sum of c log c, and the same without each row."""
    overall = np.bincount(counted.grams, counted.counts, counted.num_grams)
    total, weighted = overall.sum(), _n_log_n(overall).sum()
    whole = float(np.log(total) - weighted / total)
    if counted.num_rows < 2:
        return Estimate(whole, None, counted.num_rows)
    with_it = overall[counted.grams]
    lost = counted.per_row(_n_log_n(with_it) - _n_log_n(with_it - counted.counts))
    left = total - counted.per_row(counted.counts)
    return jackknife(whole, np.log(left) - (weighted - lost) / left)


def _distinct(counted: _Counted) -> Distinct:
    totals = counted.per_row(counted.counts)
    own = counted.per_row(np.ones(len(counted.rows)))
    within = ratio(own, totals)
    total, overall = totals.sum(), float(counted.num_grams / totals.sum())
    if counted.num_rows < 2:
        return Distinct(counted.n, Estimate(overall, None, counted.num_rows), within)
    is_alone = np.bincount(counted.grams, minlength=counted.num_grams)[counted.grams] == 1
    without = (counted.num_grams - counted.per_row(is_alone.astype(np.float64))) / (total - totals)
    return Distinct(counted.n, jackknife(overall, without), within)
