"""UnmaskPolicy: which open positions of a block to commit after a denoiser call. Frozen values, numpy only.

A policy says what makes a position sure (`ranks_by`), and how many and which sure ones it takes. The quota, which the
engine has from the steps that are left, is its floor: so decoding ends within its budget.
"""

from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.seeding import Bools, Doubles, Floats

Rank = Literal["confidence", "margin", "entropy"]
"""Of a position's law p: p of the proposed token; p of the best less p of the second; minus its entropy in nats."""

_COOLEST = 1e-300  # scores are as far apart there as float64 can tell


class UnmaskPolicy(Protocol):
    """Decides on the open positions of one row's current block."""

    ranks_by: ClassVar[Rank]

    @property
    def draws(self) -> bool:
        """Whether it looks at u."""

    def choose(self, score: Floats, quota: int, u: Floats) -> Bools:
        """Positions to commit, never fewer than `quota`. score [n]: by `ranks_by`, higher is surer; u [n] in [0, 1)."""


class _Quota(Frozen):
    """The best positions, as many as the quota demands: so the number of calls is fixed.

    position_temperature above 0 draws them without replacement with chances that fall as exp(score / it): Dream's
    `alg_temp`, arXiv:2508.15487.
    """

    ranks_by: ClassVar[Rank] = "confidence"
    position_temperature: float = Field(0.0, ge=0, le=1000)

    @property
    def draws(self) -> bool:
        """At a temperature."""
        return self.position_temperature > 0

    def choose(self, score: Floats, quota: int, u: Floats) -> Bools:
        """The quota's best, or drawn."""
        return best(_drawn(score, self.position_temperature, u), quota)


class LowConfidencePolicy(_Quota):
    """Those whose token is the likeliest; the others stay masked. MaskGIT, arXiv:2202.04200; LLaDA."""

    type: Literal["low_confidence"] = "low_confidence"


class MarginPolicy(_Quota):
    """Those whose best token is furthest ahead of the second. arXiv:2502.06768, section 4.1."""

    ranks_by: ClassVar[Rank] = "margin"
    type: Literal["margin"] = "margin"


class EntropyPolicy(_Quota):
    """Those whose law has the least entropy."""

    ranks_by: ClassVar[Rank] = "entropy"
    type: Literal["entropy"] = "entropy"


class RandomPolicy(Frozen):
    """Any: the order says nothing of the model. LLaDA's `random` remasking."""

    ranks_by: ClassVar[Rank] = "confidence"
    draws: ClassVar[bool] = True
    type: Literal["random"] = "random"

    def choose(self, score: Floats, quota: int, u: Floats) -> Bools:
        """The quota's largest u."""
        return best(u, quota)


class ThresholdPolicy(Frozen):
    """Commit every position whose confidence reaches `threshold`. Fast-dLLM, arXiv:2505.22618, section 3.3."""

    ranks_by: ClassVar[Rank] = "confidence"
    draws: ClassVar[bool] = False
    type: Literal["threshold"] = "threshold"
    threshold: float = Field(0.9, gt=0, le=1)

    def choose(self, score: Floats, quota: int, u: Floats) -> Bools:
        """All that are sure enough, filled up with the surest."""
        return best(score, quota) | (score >= self.threshold)


class FactorPolicy(Frozen):
    """The n surest, n as large as (n + 1) (1 - c_n) < factor allows, c_n the n-th confidence. Fast-dLLM, theorem 1.

    Greedy parallel decoding is then greedy sequential decoding where the factor is at most 1. takes_last: where all but
    the last candidate pass, take it too, as published code does.
    """

    ranks_by: ClassVar[Rank] = "confidence"
    draws: ClassVar[bool] = False
    type: Literal["factor"] = "factor"
    factor: float = Field(1.0, gt=0)
    takes_last: bool = False

    def choose(self, score: Floats, quota: int, u: Floats) -> Bools:
        """The n surest, or the quota's."""
        surest = np.sort(score.astype(np.float64))[::-1]
        fails = (np.arange(2, len(surest) + 2) * (1 - surest) >= self.factor)[1:]
        number = 1 + (int(fails.argmax()) if fails.any() else len(fails))
        if self.takes_last and number == len(score) - 1:
            number += 1
        return best(score, max(number, quota))


AnyUnmaskPolicy = ThresholdPolicy | LowConfidencePolicy | MarginPolicy | EntropyPolicy | RandomPolicy | FactorPolicy


def _drawn(score: Floats, temperature: float, u: Floats) -> Doubles:
    """Scores whose k largest are k draws without replacement by softmax(score / temperature). arXiv:1903.06059."""
    if not temperature:
        return score.astype(np.float64)
    gumbel: Doubles = -np.log(-np.log(u.astype(np.float64).clip(2.0**-25, 1 - 2.0**-25)))
    return score.astype(np.float64) / max(temperature, _COOLEST) + gumbel


def best(score: NDArray[Any], number: int) -> Bools:
    """The `number` highest scores; of equals the leftmost."""
    chosen = np.zeros(len(score), dtype=bool)
    chosen[np.argsort(-score, kind="stable")[:number]] = True
    return chosen
