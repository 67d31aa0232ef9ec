"""Context-adaptive weights: a mask with clean neighbours has more to learn from than one in the middle of masks."""

import torch
from torch import Tensor

from dllm_core.model.visibility import offsets


def context_weights(is_clean: Tensor, segment_ids: Tensor | None, rate: float) -> Tensor:
    """w_i = sum over clean j != i of 1/2 rate (1 - rate)^(|i - j| - 1), fp32 [B L]; at most 1, 0 without context.

    CART of Dream (arXiv:2508.15487). is_clean bool [B L]; a position counts neighbours of its own segment, a run of
    equal segment_ids [B L]. O(B L log L).
    """
    clean = is_clean.float() * (rate / 2)
    if segment_ids is None:
        segment_ids = torch.zeros_like(is_clean, dtype=torch.int32)
    return _before(clean, segment_ids, 1 - rate) + _before(clean.flip(1), segment_ids.flip(1), 1 - rate).flip(1)


def context_weights_in_blocks(
    is_clean: Tensor, is_real: Tensor | None, segment_ids: Tensor | None, rate: float, block_length: int
) -> Tensor:
    """The same in [xt ; x0], by what a mask sees there: its own block as it is noised, the blocks of its document
    before it clean, none behind it. is_clean: of xt; is_real bool [B L]: the rest is filler, which is never clean.
    """
    labels = [label for label in (is_real, segment_ids) if label is not None]
    offset = offsets(labels, is_clean.shape[1], is_clean.device).expand(is_clean.shape)
    within = offset % block_length
    own = context_weights(is_clean, (within == 0).cumsum(1), rate)
    text = torch.ones_like(is_clean) if is_real is None else is_real
    earlier = _before(text.float() * (rate / 2), (offset == 0).cumsum(1), 1 - rate)
    block_start = torch.arange(is_clean.shape[1], device=is_clean.device) - within
    return own + (1 - rate) ** within * earlier.gather(1, block_start)


def _before(values: Tensor, segment_ids: Tensor, decay: float) -> Tensor:
    """What stands before each position, faded: sum over j < i of decay^(i - j - 1) values_j. Each round doubles the
    reach: one operation a position would launch as many kernels as a row has tokens.
    """

    def shifted(array: Tensor, by: int) -> Tensor:
        moved = torch.zeros_like(array)
        is_same = segment_ids[:, by:] == segment_ids[:, :-by]
        moved[:, by:] = torch.where(is_same, array[:, :-by], 0.0)
        return moved

    total, reach = shifted(values, 1), 1
    while reach < values.shape[1]:
        total = total + decay**reach * shifted(total, reach)
        reach *= 2
    return total
