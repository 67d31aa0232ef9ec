"""Likelihood of an answer given what stands before it, in nats with its error: of one token or of a whole text.

A long answer is scored in windows, by the chain rule: each token counts once, given what fits of the text before it.
A row ends with the tokens that count: nothing behind them is shown, not even that something follows.

Law: a score is a pure function of (seed, context, answer): of no other question, no batch and no order of them.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch

from dllm_core.decoding.forward import padded_length
from dllm_core.evaluation.estimators import Estimator, ExactCount, HeldoutRows, ask, before
from dllm_core.evaluation.likelihood import RowScores, rounds, score_rows, side_by_side
from dllm_core.evaluation.question import AnswerScore, Question
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.pattern import CAUSAL
from dllm_core.objective.loss import DenoiserLike


def windows(question: Question, length: int, overlap: int) -> list[Question]:
    """A question as questions of at most `length` tokens, whose log-likelihoods add up to its own.

    Each counts as many new tokens as fit behind `overlap` tokens of what stands before them, or behind all if there
    are fewer; it is given as much as fits, so the last, which has few new tokens, is given most. overlap < length.
    """
    text, at = question.context + question.answer, len(question.context)
    found = []
    while at < len(text):
        stop = min(len(text), at + length - min(overlap, at))
        found.append(Question(text[max(0, stop - length) : at], text[at:stop]))
        at = stop
    return found


class KnownDenoiser(DenoiserLike, Protocol):
    """One that says of what shape it is, and where."""

    config: DenoiserConfig

    @property
    def device(self) -> torch.device:
        """Where its weights are."""


@dataclass(frozen=True)
class _Window:
    """A row: whose it is of a batch's questions, what it asks, the id of its draws."""

    owner: int
    question: Question
    row_id: int


class AnswerScorer:
    """Scores questions with one denoiser and the estimator that fits it, in batches of equal padded length.

    draws: at most, with target_error: nats of an answer's Monte-Carlo error at which its draws end. That is asked of
    each answer's own draws, every four of them, so an error that is small by chance ends them early.
    """

    def __init__(
        self,
        denoiser: KnownDenoiser,
        estimator: Estimator,
        *,
        seed: int = 0,
        draws: int = 64,
        target_error: float | None = None,
        overlap: int = 1,
        max_batch_tokens: int = 4096,
    ) -> None:
        self._denoiser, self._estimator = denoiser, estimator
        self._seed, self._draws, self._target_error = seed, draws, target_error
        self._overlap, self._max_batch_tokens = overlap, max_batch_tokens

    def score(self, questions: Sequence[Question]) -> Iterator[dict[Question, AnswerScore]]:
        """Batch by batch, the longest first; equal questions are asked once, and an empty answer costs nothing."""
        for batch in self._batches(questions):
            yield self._scored(batch)
        nothing = {question: AnswerScore(0.0, 0.0, 0) for question in questions if not question.answer}
        if nothing:
            yield nothing

    @torch.inference_mode()
    def are_likeliest(self, questions: Sequence[Question]) -> dict[Question, bool]:
        """Whether every token of an answer is the likeliest behind all before it, for an autoregressive model.

        That is what it would decode token by token at temperature 0, in one forward instead of one a token.
        """
        answers = dict.fromkeys(questions, True)
        config, device = self._denoiser.config, self._denoiser.device
        for batch in self._batches(questions):
            for some in self._chunks(self._windows(batch)):
                rows = self._rows(some)
                logits = ask(self._denoiser, rows, before(rows, config.mask_id), rows.counted, CAUSAL, device)
                logits[:, [config.mask_id, config.pad_id]] = -torch.inf  # no answer holds either, in decoding too
                missed = logits.argmax(-1).cpu().numpy() != rows.x0[rows.counted]
                for row in np.unique(np.nonzero(rows.counted)[0][missed]):
                    answers[batch[some[row].owner]] = False
        return answers

    def _scored(self, batch: list[Question]) -> dict[Question, AnswerScore]:
        """Rounds of draws; a question whose error is small enough takes no part in the next."""
        parts, is_sure = self._windows(batch), self._is_sure(batch[0])
        nats, variance, draws = (np.zeros(len(batch)) for _ in range(3))
        is_open = np.ones(len(batch), bool)
        for first, count in [(0, 1)] if is_sure else rounds(self._draws, self._target_error):
            some = [part for part in parts if is_open[part.owner]]
            scores = side_by_side([self._score_rows(self._rows(rows), first, count) for rows in self._chunks(some)])
            owners = [part.owner for part in some]
            own_nats, own_variance = (np.bincount(owners, v, len(batch)) for v in (scores.nats, scores.variance))
            share = np.where(is_open, count / (draws + count), 0.0)
            nats += share * (own_nats - nats)
            variance = (1 - share) ** 2 * variance + share**2 * own_variance
            draws += np.where(is_open, count, 0)
            if self._target_error is not None:
                is_open &= ~(np.sqrt(variance) <= self._target_error)
            if not is_open.any():
                break
        errors = [0.0 if is_sure else None if math.isnan(own) else math.sqrt(own) for own in variance]
        return {question: AnswerScore(float(nats[i]), errors[i], int(draws[i])) for i, question in enumerate(batch)}

    def _score_rows(self, rows: HeldoutRows, first: int, count: int) -> RowScores:
        return score_rows(self._denoiser, self._estimator, rows, seed=self._seed, draws=count, first=first)

    def _is_sure(self, question: Question) -> bool:
        """Whether one draw tells all: of the only token that counts, exactly one is masked in every draw."""
        is_one = isinstance(self._estimator, ExactCount) and len(question.answer) == 1
        return self._estimator.is_exact or is_one

    def _batches(self, questions: Sequence[Question]) -> Iterator[list[Question]]:
        """Questions alike in length and in whether one draw is enough, at least one, as many as the budget holds."""

        def kind(question: Question) -> tuple[int, bool]:
            return -self._padded(question), self._is_sure(question)

        asked = {question for question in questions if question.answer}
        for (padded, _), alike in groupby(sorted(asked, key=lambda q: (kind(q), q)), key=kind):
            batch: list[Question] = []
            taken = 0
            for question in alike:
                cost = -padded * len(self._cut(question))
                if batch and taken + cost > self._max_batch_tokens:
                    yield batch
                    batch, taken = [], 0
                batch.append(question)
                taken += cost
            yield batch

    def _cut(self, question: Question) -> list[Question]:
        return windows(question, self._denoiser.config.context_length, self._overlap)

    def _padded(self, question: Question) -> int:
        """Positions of each of its rows: all windows of a question that has several are full."""
        length = len(question.context) + len(question.answer)
        return padded_length(min(length, self._denoiser.config.context_length))

    def _windows(self, batch: list[Question]) -> list[_Window]:
        return [
            _Window(owner, part, question.digest(number))
            for owner, question in enumerate(batch)
            for number, part in enumerate(self._cut(question))
        ]

    def _chunks(self, parts: list[_Window]) -> Iterator[list[_Window]]:
        """What one forward holds: of a text with many windows not all."""
        size = max(1, self._max_batch_tokens // self._padded(parts[0].question))
        for start in range(0, len(parts), size):
            yield parts[start : start + size]

    def _rows(self, parts: list[_Window]) -> HeldoutRows:
        """Padded by their own length alone, as in decoding: else their last bit would depend on their neighbours."""
        length = self._padded(parts[0].question)
        x0 = np.full((len(parts), length), self._denoiser.config.pad_id, np.int64)
        counted, is_real = (np.zeros(x0.shape, bool) for _ in range(2))
        for row, part in enumerate(parts):
            given, stop = len(part.question.context), len(part.question.context) + len(part.question.answer)
            x0[row, :stop] = part.question.context + part.question.answer
            counted[row, given:stop] = True
            is_real[row, :stop] = True
        return HeldoutRows(x0, counted, np.array([part.row_id for part in parts], np.int64), is_real)
