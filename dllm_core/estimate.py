"""A figure and how far it may be off: ratios of sums over rows, proportions, and whatever a jackknife can repeat.

Rows are the unit, or what several share: tokens of a row share its text and its noise, rows of a document its words,
so counting them as independent would flatter.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from dllm_core.seeding import Doubles

_Z = 1.959963984540054  # the normal's 97.5 % quantile


@dataclass(frozen=True)
class Estimate:
    """value; standard_error: None where one row alone was seen, from which no spread can be told; rows: how many.

    Rows of one unit count once in `rows`, and as one.
    """

    value: float
    standard_error: float | None
    rows: int


@dataclass(frozen=True)
class Proportion(Estimate):
    """low, high: a 95 % interval that does not shrink to nothing where all or none are right."""

    low: float
    high: float


def measure_seed(seed: int, measure: str) -> int:
    """A key of 64 bits for one measure's draws, so that no two measures share a uniform."""
    return int.from_bytes(hashlib.sha256(f"{measure}/{seed}".encode()).digest()[:8], "little")


def ratio(parts: ArrayLike, wholes: ArrayLike, units: ArrayLike | None = None) -> Estimate:
    """sum(parts) / sum(wholes), one pair a row [N], with its delta-method standard error (Cochran, Sampling
    Techniques, eq. 2.46).

    units [N]: a number that rows of one document share; None: each row is a unit. Units whose whole is 0 take no part.
    Raises ValueError where none does.
    """
    parts, wholes = _taking_part(parts, wholes, units)
    rows, total = len(parts), float(wholes.sum())
    value = float(parts.sum()) / total
    if rows < 2:
        return Estimate(value, None, rows)
    residual = parts - value * wholes
    return Estimate(value, math.sqrt(float((residual**2).sum()) * rows / (rows - 1)) / total, rows)


def proportion(hits: ArrayLike, trials: ArrayLike, units: ArrayLike | None = None) -> Proportion:
    """Hits / trials, each [N] a row's count, with Wilson's interval (JASA 22, 1927, p. 209). units: as `ratio`.

    Its number of trials is the effective one, p (1 - p) / standard_error^2: so many independent trials would be as
    sure. Where all or none are right the rows agree to the last trial, and each row counts as one.
    """
    hits, trials = _taking_part(hits, trials, units)
    found = ratio(hits, trials)
    p, n = found.value, float(found.rows)
    if found.standard_error and 0 < p < 1:
        n = min(float(trials.sum()), p * (1 - p) / found.standard_error**2)
    shrunk = 1 + _Z**2 / n
    centre = (p + _Z**2 / (2 * n)) / shrunk
    half = _Z * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n**2)) / shrunk
    return Proportion(
        p, found.standard_error, found.rows, min(max(centre - half, 0.0), p), max(min(centre + half, 1.0), p)
    )


def jackknife(whole: float, without: Doubles) -> Estimate:
    """A statistic of all rows, with the error that leaving out one row after the other shows; without [N]."""
    rows = len(without)
    if rows < 2:
        return Estimate(whole, None, rows)
    spread = float(((without - without.mean()) ** 2).sum())
    return Estimate(whole, math.sqrt(spread * (rows - 1) / rows), rows)


def summed(values: ArrayLike, units: ArrayLike | None) -> Doubles:
    """Values [N ...] added up over the rows of each unit [U ...]; units [N] as `ratio` takes them."""
    values = np.asarray(values, np.float64)
    if units is None:
        return values
    _, place = np.unique(units, return_inverse=True)
    total = np.zeros((int(place.max(initial=-1)) + 1, *values.shape[1:]))
    np.add.at(total, place, values)
    return total


def _taking_part(parts: ArrayLike, wholes: ArrayLike, units: ArrayLike | None) -> tuple[Doubles, Doubles]:
    parts, wholes = summed(parts, units), summed(wholes, units)
    kept = wholes > 0
    if not kept.any():
        raise ValueError("an estimate needs a row in which something is counted")
    return parts[kept], wholes[kept]
