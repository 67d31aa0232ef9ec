"""UnmaskPolicy: which open positions of a block to commit after a denoiser call. Frozen values, numpy only.

The quota is the floor that makes decoding end: the engine asks for ceil(open / steps left) positions at least, which
splits a block over its steps as LLaDA's generate does (arXiv:2502.09992, algorithm 4).
"""

from typing import Annotated, Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dllm_core.config.base import Frozen

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]


class UnmaskPolicy(Protocol):
    """Decides on one row's current block."""

    def choose(self, confidence: Floats, is_open: Bools, quota: int) -> Bools:
        """Positions to commit: a subset of `is_open`, never fewer than `quota`. confidence, is_open: [n]."""


class ThresholdPolicy(Frozen):
    """Commit every position whose confidence reaches `threshold`. Fast-dLLM, arXiv:2505.22618, section 3.3."""

    type: Literal["threshold"] = "threshold"
    threshold: float = Field(0.9, gt=0, le=1)

    def choose(self, confidence: Floats, is_open: Bools, quota: int) -> Bools:
        """All that are sure enough, filled up with the surest."""
        chosen = _surest(confidence, is_open, quota)
        return chosen | (is_open & (confidence >= self.threshold))


class LowConfidencePolicy(Frozen):
    """Commit the quota of surest positions: a fixed number of calls. MaskGIT, arXiv:2202.04200; LLaDA."""

    type: Literal["low_confidence"] = "low_confidence"

    def choose(self, confidence: Floats, is_open: Bools, quota: int) -> Bools:
        """The quota's surest."""
        return _surest(confidence, is_open, quota)


AnyUnmaskPolicy = Annotated[ThresholdPolicy | LowConfidencePolicy, Field(discriminator="type")]


def _surest(confidence: Floats, is_open: Bools, quota: int) -> Bools:
    """The `quota` open positions of highest confidence; of equals the leftmost."""
    ranked = np.argsort(np.where(is_open, -confidence, np.inf), kind="stable")
    chosen = np.zeros_like(is_open)
    chosen[ranked[:quota]] = True
    return chosen & is_open
