"""Reliability of confidence: of the tokens that a denoiser is 80 % sure of, are 80 % right? At several mask rates.

A threshold policy commits by confidence, so what it may trust is measured here.
`score_calibration` -> `summarize_calibration`. A row's masks are nested: a higher rate hides more, never others.
"""

import math
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch

from dllm_core.estimate import Estimate, Proportion, jackknife, measure_seed, proportion, ratio, summed
from dllm_core.evaluation.estimators import HeldoutRows, ask, before
from dllm_core.model.pattern import FULL, AttentionPattern
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Doubles, Ints, Purpose, uniforms

NUM_BINS = 10


@dataclass(frozen=True)
class CalibrationScores:
    """Sums over the masked tokens of each row, by bin of confidence: tokens, hits, confidence float64 [N K].

    brier float64 [N]: sum over tokens of |p - onehot(truth)|^2, in [0, 2] each (Brier, 1950).
    """

    rate: float
    tokens: Doubles
    hits: Doubles
    confidence: Doubles
    brier: Doubles

    def joined(self, other: Self) -> Self:
        """These rows, then those."""
        return replace(
            self,
            tokens=np.concatenate([self.tokens, other.tokens]),
            hits=np.concatenate([self.hits, other.hits]),
            confidence=np.concatenate([self.confidence, other.confidence]),
            brier=np.concatenate([self.brier, other.brier]),
        )


@torch.inference_mode()
def score_calibration(
    denoiser: DenoiserLike,
    process: AbsorbingProcess,
    rows: HeldoutRows,
    *,
    rate: float,
    seed: int,
    device: torch.device,
    pattern: AttentionPattern = FULL,
    is_timed: bool = False,
) -> CalibrationScores:
    """Hide each counted token with probability `rate` and ask for it in one call.

    pattern: the objective's, whose training pass is run; a causal model is asked for the same tokens, each from all
    that stands before it, so the rate only decides how many. is_timed: the denoiser is told t.
    """
    draws = uniforms(measure_seed(seed, "calibration"), Purpose.EVALUATE, 0, rows.ids, rows.x0.shape[1])
    hidden = rows.counted & (draws < rate)
    by_bin = np.zeros((3, len(rows.x0), NUM_BINS))
    scores = CalibrationScores(rate, by_bin[0], by_bin[1], by_bin[2], np.zeros(len(rows.x0)))
    if not hidden.any():
        return scores
    when = {}
    if is_timed:
        time = np.full(rows.x0.shape, process.schedule.inverse(np.float64(1 - rate)), np.float32)
        when["t"] = torch.from_numpy(time).to(device)
    shown = before(rows, process.mask_id) if pattern.kind == "causal" else np.where(hidden, process.mask_id, rows.x0)
    log_probs = process.x0_log_probs(ask(denoiser, rows, shown, hidden, pattern, device, **when))
    probs = log_probs.double().exp()
    confidence, guess = probs.max(-1)
    truth = torch.from_numpy(rows.x0[hidden]).to(device)
    brier = 1 - 2 * probs.gather(-1, truth[:, None])[:, 0] + (probs**2).sum(-1)
    sure = confidence.cpu().numpy()
    at = (np.nonzero(hidden)[0], np.minimum((sure * NUM_BINS).astype(np.int64), NUM_BINS - 1))
    np.add.at(scores.tokens, at, 1.0)
    np.add.at(scores.hits, at, (guess == truth).double().cpu().numpy())
    np.add.at(scores.confidence, at, sure)
    np.add.at(scores.brier, at[0], brier.cpu().numpy())
    return scores


@dataclass(frozen=True)
class ReliabilityBin:
    """Tokens whose confidence lies in [low, high): the mean of it, and how many of them were right."""

    low: float
    high: float
    tokens: int
    confidence: Estimate
    accuracy: Proportion


@dataclass(frozen=True)
class Calibration:
    """At one mask rate. bins: those that hold a token.

    expected_error: ECE, the mean over tokens of |accuracy - confidence| of their bin (Guo et al., arXiv:1706.04599,
    eq. 3), with a jackknife error. It is never below 0, so chance alone makes some: `expected_error_by_chance` is what
    a perfectly calibrated denoiser would show on these rows.
    """

    rate: float
    tokens: int
    bins: tuple[ReliabilityBin, ...]
    accuracy: Proportion
    confidence: Estimate
    expected_error: Estimate
    expected_error_by_chance: float
    brier: Estimate


def summarize_calibration(scores: CalibrationScores, documents: Ints | None = None) -> Calibration | None:
    """None where no token was hidden. documents [N]: which document each row is of, None: each of its own."""
    scores = CalibrationScores(
        scores.rate,
        summed(scores.tokens, documents),
        summed(scores.hits, documents),
        summed(scores.confidence, documents),
        summed(scores.brier, documents),
    )
    tokens = scores.tokens.sum(1)
    if not tokens.any():
        return None
    edges = np.arange(scores.tokens.shape[1] + 1) / scores.tokens.shape[1]
    bins = tuple(
        ReliabilityBin(
            low=float(edges[k]),
            high=float(edges[k + 1]),
            tokens=int(scores.tokens[:, k].sum()),
            confidence=ratio(scores.confidence[:, k], scores.tokens[:, k]),
            accuracy=proportion(scores.hits[:, k], scores.tokens[:, k]),
        )
        for k in np.flatnonzero(scores.tokens.sum(0))
    )
    error, by_chance = _expected_error(scores)
    return Calibration(
        rate=scores.rate,
        tokens=int(tokens.sum()),
        bins=bins,
        accuracy=proportion(scores.hits.sum(1), tokens),
        confidence=ratio(scores.confidence.sum(1), tokens),
        expected_error=error,
        expected_error_by_chance=by_chance,
        brier=ratio(scores.brier, tokens),
    )


def _expected_error(scores: CalibrationScores) -> tuple[Estimate, float]:
    """ECE, and its mean where every bin's gap is normal around 0 with the spread that the rows show."""
    tokens = scores.tokens.sum(1)
    kept = tokens > 0
    tokens, gaps = tokens[kept], (scores.hits - scores.confidence)[kept]
    gap, total, rows = gaps.sum(0), float(tokens.sum()), len(tokens)
    value = float(np.abs(gap).sum()) / total
    if rows < 2:
        return Estimate(value, None, rows), value
    without = np.abs(gap - gaps).sum(1) / (total - tokens)
    spread = np.sqrt(((gaps - gaps.mean(0)) ** 2).sum(0) * rows / (rows - 1))
    return jackknife(value, without), math.sqrt(2 / math.pi) * float(spread.sum()) / total
