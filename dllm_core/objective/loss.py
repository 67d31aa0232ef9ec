"""LossSum and the Objective protocol: a sum and a count, so that any split of a batch gives the same step."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dllm_core.data.batch import Batch


class DenoiserLike(Protocol):
    """Anything that gives logits [n V] at the n positions of `read`."""

    def __call__(self, input_ids: Tensor, *, read: Tensor, segment_ids: Tensor | None = None) -> Tensor:
        """input_ids int64 [B L], read bool [B L], segment_ids int [B L] where documents are isolated."""


@dataclass(frozen=True)
class LossSum:
    """Sums over a batch; divide by `num_tokens` once, after adding up all ranks.

    nats: what is minimised, fp32 scalar with its graph. bound_nats: the NELBO itself (equal to nats when the
    weight is not changed for training), detached. num_tokens: counted tokens, noised or not.
    """

    nats: Tensor
    bound_nats: Tensor
    num_tokens: int


class Objective(Protocol):
    """A training target over a denoiser and a batch."""

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Sum of nats over the batch's counted tokens."""
