"""Context-adaptive weights: a mask with clean neighbours has more to learn from than one in the middle of masks."""

import torch
from torch import Tensor


def context_weights(is_clean: Tensor, segment_ids: Tensor | None, rate: float) -> Tensor:
    """w_i = sum over clean j != i of 1/2 rate (1 - rate)^(|i - j| - 1), fp32 [B L]; at most 1, 0 without context.

    CART of Dream (arXiv:2508.15487). is_clean bool [B L]; a position counts neighbours of its own segment.
    Two scans of a linear recurrence, O(B L).
    """
    clean = is_clean.float() * (rate / 2)
    fresh = torch.ones_like(is_clean)
    if segment_ids is not None:
        fresh[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    else:
        fresh[:, 1:] = False
    ends = torch.cat([fresh[:, 1:], torch.ones_like(fresh[:, :1])], dim=1)
    return _scan(clean, fresh, rate) + _scan(clean.flip(1), ends.flip(1), rate).flip(1)


def _scan(clean: Tensor, fresh: Tensor, rate: float) -> Tensor:
    """What stands before each position, faded; a fresh segment has nothing before it."""
    total = torch.zeros_like(clean[:, 0])
    sums = []
    for i in range(clean.shape[1]):
        total = torch.where(fresh[:, i], 0.0, total)
        sums.append(total)
        total = total * (1 - rate) + clean[:, i]
    return torch.stack(sums, dim=1)
