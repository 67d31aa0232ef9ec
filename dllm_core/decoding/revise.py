"""Policies that may take a token back: nothing of a block is final before the block is settled, and then all of it is.

They decide from what stands at a block's open positions, what a call proposes for them, and how much of the budget is
left. Frozen values, numpy only; masks alone: replaced tokens have a reverse process of their own.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.decoding.unmask import Rank, best
from dllm_core.seeding import Bools, Floats


@dataclass(frozen=True)
class Moment:
    """A call's proposals for the n open positions of a block.

    is_mask [n]: the position holds the mask; agrees [n]: the proposal is what it holds; confidence [n]: of the
    proposal; u [n] in [0, 1). step, from 0, of `steps`, after which no mask is left; quota: masks to fill at least.
    alpha_t, alpha_s: what survives at this step's time and at the next one's, 0 at first and 1 after the last.
    """

    is_mask: Bools
    agrees: Bools
    confidence: Floats
    u: Floats
    step: int
    steps: int
    quota: int
    alpha_t: float
    alpha_s: float


@dataclass(frozen=True)
class Verdict:
    """fill [n]: positions that take their proposal; remask [n]: that become masks again; is_settled: the block is."""

    fill: Bools
    remask: Bools
    is_settled: bool


class RevisingPolicy(Protocol):
    """Decides on the open positions of one row's current block."""

    ranks_by: ClassVar[Rank]

    @property
    def draws(self) -> bool:
        """Whether it looks at u."""

    def revise(self, now: Moment) -> Verdict:
        """What changes. No mask is left once `steps` are taken, and it settles within `calls`."""

    def calls(self, steps: int) -> int:
        """The most calls that a block of so many steps may take."""


class RemaskingPolicy(Frozen):
    """The reverse process of masks, in which a token that was revealed may be masked again. ReMDM, arXiv:2503.00307.

    From t to s a token is masked again with probability sigma, and a mask revealed with (alpha_s - (1 - sigma) alpha_t)
    / (1 - alpha_t): the share of masks at s is 1 - alpha_s for every sigma (eq. 5). sigma: `eta`, at most (cap) or
    times (rescale) the largest that is possible, min(1, (1 - alpha_s) / alpha_t); eta=0 is MDLM's ancestral sampler.
    """

    ranks_by: ClassVar[Rank] = "confidence"
    draws: ClassVar[bool] = True
    type: Literal["remasking"] = "remasking"
    eta: float = Field(0.02, ge=0, le=1)
    strategy: Literal["cap", "rescale"] = "cap"

    def revise(self, now: Moment) -> Verdict:
        """Each position by its own u."""
        highest = min(1.0, (1 - now.alpha_s) / now.alpha_t) if now.alpha_t > 0 else 1.0
        sigma = min(self.eta, highest) if self.strategy == "cap" else self.eta * highest
        share = 1 - now.alpha_t  # of masks; of a steep schedule's last steps none that float64 tells from 0
        reveal = (now.alpha_s - (1 - sigma) * now.alpha_t) / share if share else 1.0
        is_last = now.step + 1 >= now.steps
        return Verdict(
            now.is_mask & ((now.u < reveal) | is_last), ~now.is_mask & (now.u < sigma) & (not is_last), is_last
        )

    def calls(self, steps: int) -> int:
        """Each step is one."""
        return steps


class AncestralPolicy(Frozen):
    """The reverse process of masks: each is revealed with the chance that time gives. MDLM, arXiv:2406.07524, eq. 6."""

    ranks_by: ClassVar[Rank] = "confidence"
    draws: ClassVar[bool] = True
    type: Literal["ancestral"] = "ancestral"

    def revise(self, now: Moment) -> Verdict:
        """Remasking that masks none again."""
        return RemaskingPolicy(eta=0).revise(now)

    def calls(self, steps: int) -> int:
        """Each step is one."""
        return steps


class EditingPolicy(Frozen):
    """Two thresholds: masks are filled where a token is sure enough, and tokens replaced where another one is surer.

    LLaDA2.1's token editing (arXiv:2602.08676): a block is settled by a call that finds no mask and edits nothing, and
    after `max_edits` calls beyond its steps in any case.
    """

    ranks_by: ClassVar[Rank] = "confidence"
    draws: ClassVar[bool] = False
    type: Literal["editing"] = "editing"
    threshold: float = Field(0.7, gt=0, le=1, description="of a token for a mask")
    edit_threshold: float = Field(0.9, gt=0, le=1, description="of a token for another token")
    max_edits: int = Field(16, ge=0)

    def revise(self, now: Moment) -> Verdict:
        """All that is sure enough, and the quota's surest masks."""
        fill = now.is_mask & (now.confidence >= self.threshold)
        if fill.sum() < now.quota:
            fill |= best(now.confidence * now.is_mask - ~now.is_mask, now.quota)
        edits = ~now.is_mask & ~now.agrees & (now.confidence > self.edit_threshold)
        is_over = now.step + 1 >= self.calls(now.steps)  # no mask is left by then
        return Verdict(fill | edits, np.zeros_like(fill), is_over or not (now.is_mask | edits).any())

    def calls(self, steps: int) -> int:
        """Those that fill, and those that edit."""
        return steps + self.max_edits
