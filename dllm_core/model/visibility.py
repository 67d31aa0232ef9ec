"""Who sees whom: an AttentionPattern, isolated documents and padding as one boolean relation of queries and keys."""

import torch
from torch import Tensor

from dllm_core.model.pattern import AttentionPattern


def visible_keys(
    pattern: AttentionPattern,
    length: int,
    device: torch.device,
    is_real: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor | None:
    """The keys that each query sees: bool [B or 1, Q or 1, K], or None where all see all.

    length L is the row's, so Q = K = L, or 2 L under `block_diffusion`, whose halves share is_real bool [B L] and
    segment_ids int [B L]. The first dimension is 1 unless rows differ, the second unless queries do.

    A document is a run of equal segment_ids, and padding (is_real False) stands at the ends of a row or document:
    blocks are counted from where either changes. No real position sees padding, which sees its like, so that no
    query's softmax is over nothing.
    """
    if pattern.kind == "full" and segment_ids is None:
        return None if is_real is None else is_real[:, None]
    labels = [label for label in (is_real, segment_ids) if label is not None]
    same_document = _all_equal(labels) if labels else None
    if pattern.kind == "full":
        return same_document
    block = offsets(labels, length, device) // (pattern.block_length or 1)
    up_to_own = block[:, :, None] >= block[:, None, :]
    if same_document is not None:
        up_to_own &= same_document
    if not pattern.has_clean_half:
        return up_to_own
    own = up_to_own & (block[:, :, None] == block[:, None, :])
    noised = torch.cat([own, up_to_own & ~own], dim=-1)
    clean = torch.cat([torch.zeros_like(own), up_to_own], dim=-1)
    return torch.cat([noised, clean], dim=-2)


def predecessors(
    pattern: AttentionPattern,
    length: int,
    device: torch.device,
    is_real: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> Tensor:
    """The position whose output tells a token where logits are shifted: int64 [B or 1, L], into a row or [xt ; x0].

    The one before it; a document's first token has none and tells itself. In [xt ; x0] a block's first token is told
    by its clean predecessor, which is what stands before the block when it is decoded.
    """
    labels = [label for label in (is_real, segment_ids) if label is not None]
    offset = offsets(labels, length, device)
    index = torch.arange(length, device=device)
    teller = torch.where(offset == 0, index, index - 1)
    if pattern.has_clean_half:
        begins_block = (offset % (pattern.block_length or 1) == 0) & (offset > 0)
        teller = torch.where(begins_block, teller + length, teller)
    return teller


def told_by_previous(x: Tensor) -> Tensor:
    """[B L D] of one document's positions, each one's at that which it tells: the next. The first tells itself too."""
    return torch.cat([x[:, :1], x[:, :-1]], dim=1)


def document_starts(*labels: Tensor) -> Tensor:
    """Where a document begins, bool [B L]: at a row's first token, and wherever one of the labels [B L] changes."""
    begins = torch.zeros_like(labels[0], dtype=torch.bool)
    begins[:, :1] = True
    for label in labels:
        begins[:, 1:] |= label[:, 1:] != label[:, :-1]
    return begins


def _all_equal(labels: list[Tensor]) -> Tensor:
    """Where a pair agrees in every label [B L]: bool [B L L]."""
    equal = [label[:, :, None] == label[:, None, :] for label in labels]
    return equal[0] if len(equal) == 1 else equal[0] & equal[1]


def offsets(labels: list[Tensor], length: int, device: torch.device) -> Tensor:
    """How many tokens of its document stand before a position: int [B or 1, L]."""
    index = torch.arange(length, device=device)[None]
    if not labels:
        return index
    begins = document_starts(*labels)
    return index - torch.where(begins, index, 0).cummax(dim=1).values
