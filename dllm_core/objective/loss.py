"""LossSum, the Objective protocol and a batch as tensors: sums and counts, so that any split gives the same step."""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dllm_core.data.batch import Batch
from dllm_core.model.pattern import FULL, AttentionPattern


class DenoiserLike(Protocol):
    """Anything that gives logits [n V] at the n positions of `read`."""

    def __call__(
        self,
        input_ids: Tensor,
        is_real: Tensor | None = None,
        read: Tensor | None = None,
        segment_ids: Tensor | None = None,
        *,
        pattern: AttentionPattern = FULL,
        positions: Tensor | None = None,
        t: Tensor | None = None,
    ) -> Tensor:
        """As `Denoiser.forward`."""


LEVELS = 10
"""Of t, evenly spaced: [0, 0.1), [0.1, 0.2), ..., [0.9, 1]."""


@dataclass(frozen=True)
class LossSum:
    """Sums over a batch, to be added up over all ranks before anything is divided.

    nats: what is minimised once divided by `divisor`; fp32 scalar with its graph. bound_nats: the negative
    log-likelihood or its bound, detached, to be divided by num_tokens; NaN where an objective has none.
    num_tokens: counted tokens, noised or not. levels: fp32 [2 LEVELS], the bound's nats by t, then the counted tokens;
    None where there is no t. preferred: fp32 [2], pairs whose chosen answer is preferred, and the sum of their reward
    margins; None where there are no pairs.
    """

    nats: Tensor
    bound_nats: Tensor
    num_tokens: int
    divisor: float
    levels: Tensor | None = None
    preferred: Tensor | None = None


class Objective(Protocol):
    """A training target over a denoiser and a batch.

    pattern: who sees whom, passes: how often the denoiser runs over a batch; both decide what a token costs.
    """

    pattern: AttentionPattern
    passes: int

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Sums over the batch's counted tokens."""

    def divisor(self, batch: Batch) -> float:
        """The divisor that `loss` would tell of the batch, without asking the denoiser."""


@dataclass(frozen=True)
class Rows:
    """A batch on a device. x0, xt int64 [B L]; t fp32 [B L]; counted bool [B L]; the others as in Batch."""

    x0: Tensor
    xt: Tensor
    t: Tensor
    counted: Tensor
    is_real: Tensor | None
    segment_ids: Tensor | None

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> "Rows":
        """Copies where the device is not the CPU."""

        def moved(array: Any) -> Any:
            return None if array is None else torch.from_numpy(array).to(device)

        arrays = (batch.x0, batch.xt, batch.t, batch.loss_mask, batch.is_real, batch.segment_ids)
        return cls(*map(moved, arrays))

    @property
    def attention(self) -> dict[str, Tensor]:
        """What decides who sees whom, beside the pattern, as arguments of a denoiser."""
        given = {"is_real": self.is_real, "segment_ids": self.segment_ids}
        return {name: value for name, value in given.items() if value is not None}

    def normalized(self, cost: Tensor, read: Tensor, normalize: str) -> tuple[Tensor, float]:
        """(sum, divisor) of the costs [n] at the positions `read` [B L] under a `normalize` of the objectives."""
        if normalize == "answer":
            cost = cost / self.counted.sum(1)[read.nonzero()[:, 0]]
        return cost.sum(), self.divisor(read, normalize)

    def divisor(self, read: Tensor, normalize: str) -> float:
        """What the sum of costs at `read` is divided by."""
        if normalize == "answer":
            return float(self.counted.any(1).sum())
        return float(read.sum() if normalize == "noised" else self.counted.sum())


def by_level(t: Tensor, values: Tensor) -> Tensor:
    """Sums [LEVELS] of values [n] at times t [n] in [0, 1]. A CPU's `index_add_` took 40 ms of a step of 1,300 here."""
    level = (t * LEVELS).long().clamp_(max=LEVELS - 1)
    return torch.zeros(LEVELS, device=values.device).scatter_add_(0, level, values.float())
