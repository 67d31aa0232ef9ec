"""The held-out negative log-likelihood or its bound, in nats a token, with its errors, beside the unigram entropy.

Conventions: every real token counts, end tokens among them; filler does not. Of conversations the answers count, given
their prompts. A row is scored as the rows of training are seen: an isolated document by itself, else a row by itself.

Figures are sums in float64. The standard error has documents as its unit, or rows where they hold several: neither
tokens of a row nor rows of a document are independent. It holds what Monte Carlo adds. The Monte-Carlo error is that
part alone: what other draws for the same rows would change.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dllm_core.estimate import ratio
from dllm_core.evaluation.estimators import Draw, Estimator, HeldoutRows
from dllm_core.objective.loss import DenoiserLike
from dllm_core.seeding import Doubles, Ints

_ROUND = 4  # draws after which a target error is looked at again


@dataclass(frozen=True)
class RowScores:
    """Per row: estimated nats [N], the Monte-Carlo variance of that estimate [N] (NaN of one draw), tokens [N]."""

    nats: Doubles
    variance: Doubles
    tokens: Ints
    draws: int

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the nats a token over draws, for the rows as they are."""
        return math.sqrt(float(self.variance.sum())) / max(int(self.tokens.sum()), 1)


@dataclass(frozen=True)
class Likelihood:
    """nelbo: nats a token, exact or an upper bound in expectation, as `estimator` says; its two errors.

    bits_per_byte: of the same tokens' UTF-8 text, to which end tokens add nats and no byte. All four None for a model
    that has no likelihood, the Monte-Carlo error also after one draw, the standard error also of one document.
    """

    nelbo: float | None
    standard_error: float | None
    monte_carlo_error: float | None
    bits_per_byte: float | None
    unigram_entropy: float
    rows: int
    tokens: int
    bytes: int
    draws: int
    estimator: str | None

    @property
    def gain(self) -> float | None:
        """Nats a token below the unigram entropy."""
        return None if self.nelbo is None else self.unigram_entropy - self.nelbo


@torch.inference_mode()
def score_rows(
    denoiser: DenoiserLike, estimator: Estimator, rows: HeldoutRows, *, seed: int, draws: int, first: int = 0
) -> RowScores:
    """The draws number `first`, `first` + 1, ... of every row: one in each of `draws` strata.

    The variance of their mean is taken from neighbours around a circle, sum (y_j - y_(j+1))^2 / (2 draws^2): about the
    mean it would count how strata differ, which drawing one of each has removed. In the mean it is never too low.
    """
    tokens = rows.counted.sum(1).astype(np.int64)
    if estimator.is_exact:
        nats = estimator.nats(denoiser, rows, Draw(seed, first))
        return RowScores(nats, np.zeros(len(nats)), tokens, 1)
    # [N draws]: numpy adds up a row alike in any batch, a column of one number otherwise than one of several.
    drawn = np.stack([estimator.nats(denoiser, rows, Draw(seed, first + j, j, draws)) for j in range(draws)], axis=1)
    variance = np.full(len(tokens), np.nan)
    if draws > 1:
        variance = ((drawn - np.roll(drawn, 1, axis=1)) ** 2).sum(1) / (2 * draws**2)
    return RowScores(drawn.mean(1), variance, tokens, draws)


def estimate(score: Callable[[int, int], RowScores], draws: int, target_error: float | None = None) -> RowScores:
    """All draws of some rows, where score(first, draws) gives a round of them.

    With a target, rounds of about four draws are made until the Monte-Carlo error of all rows together is not above it,
    or `draws` are used up. Whether to go on is decided over all rows, so no batching changes it.
    """
    found: list[RowScores] = []
    for first, count in rounds(draws, target_error):
        found.append(score(first, count))
        if target_error is not None and _together(found).monte_carlo_error <= target_error:
            break
    return _together(found)


def rounds(draws: int, target_error: float | None) -> list[tuple[int, int]]:
    """(first draw, how many) of each round: one without a target, else of about four draws."""
    number = 1 if target_error is None else max(1, draws // _ROUND)
    return [(int(part[0]), len(part)) for part in np.array_split(np.arange(draws), number)]


def _together(parts: Sequence[RowScores]) -> RowScores:
    """Rounds of draws of the same rows as one, every draw alike."""
    draws = sum(part.draws for part in parts)
    shares = [part.draws / draws for part in parts]
    nats = np.sum([share * part.nats for share, part in zip(shares, parts, strict=True)], axis=0)
    variance = np.sum([share**2 * part.variance for share, part in zip(shares, parts, strict=True)], axis=0)
    return RowScores(nats, variance, parts[0].tokens, draws)


def side_by_side(parts: Sequence[RowScores]) -> RowScores:
    """The same draws of different rows."""
    nats, variance, tokens = (np.concatenate([getattr(p, n) for p in parts]) for n in ("nats", "variance", "tokens"))
    return RowScores(nats, variance, tokens, parts[0].draws)


def summarize(
    scores: RowScores, token_counts: Ints, byte_lengths: Ints, estimator: str, documents: Ints | None = None
) -> Likelihood:
    """Nats over tokens of all rows (`ratio`). Raises ValueError where no token counts.

    token_counts [V]: how often each id is among the counted tokens of these rows; byte_lengths [V]: of an id's text;
    documents [N]: which document each row is of, None: each of its own.
    """
    found, total = ratio(scores.nats, scores.tokens, documents), int(scores.tokens.sum())
    is_drawn_once = not np.isfinite(scores.variance).all()
    num_bytes = int(token_counts @ byte_lengths)
    return Likelihood(
        nelbo=found.value,
        standard_error=found.standard_error,
        monte_carlo_error=None if is_drawn_once else scores.monte_carlo_error,
        bits_per_byte=bits_per_byte(found.value, total, num_bytes),
        unigram_entropy=unigram_entropy(token_counts),
        rows=len(scores.nats),
        tokens=total,
        bytes=num_bytes,
        draws=scores.draws,
        estimator=estimator,
    )


def without_likelihood(rows: int, token_counts: Ints, byte_lengths: Ints) -> Likelihood:
    """What is left to say of rows where a model has no likelihood."""
    return Likelihood(
        nelbo=None,
        standard_error=None,
        monte_carlo_error=None,
        bits_per_byte=None,
        unigram_entropy=unigram_entropy(token_counts),
        rows=rows,
        tokens=int(token_counts.sum()),
        bytes=int(token_counts @ byte_lengths),
        draws=0,
        estimator=None,
    )


def unigram_entropy(token_counts: Ints) -> float:
    """Nats a token of the best model that knows frequencies alone, fitted to these very tokens; 0 of none."""
    share = token_counts[token_counts > 0] / token_counts.sum()
    return float((share * -np.log(share)).sum())


def bits_per_byte(nats_per_token: float, tokens: int, num_bytes: int) -> float | None:
    """Nats a token as bits a byte, nats * tokens / (ln 2 * bytes): comparable over tokenizers. None of no byte."""
    return nats_per_token * tokens / (math.log(2) * num_bytes) if num_bytes else None
