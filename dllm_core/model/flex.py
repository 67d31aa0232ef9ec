"""Who sees whom as a rule and not as a table: torch's FlexAttention, for training on a GPU. arXiv:2412.05496.

A table of 2 L x 2 L for each row is read by every layer, and what nobody sees is computed all the same. The rule is
looked at once a forward, 128 x 128 positions at a time, and tiles without a pair are left out: with documents of a
tenth of a row, some nine of ten.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dllm_core.model.pattern import AttentionPattern
from dllm_core.model.visibility import offsets, visible_keys

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_HEAD_DIMS = frozenset((16, 32, 64, 128, 256))  # that its kernels are made for


def visible_tiles(
    pattern: AttentionPattern,
    length: int,
    device: torch.device,
    is_real: Tensor | None = None,
    segment_ids: Tensor | None = None,
) -> BlockMask | None:
    """As `visible_keys`, by tiles."""
    if pattern.kind == "full" and segment_ids is None and is_real is None:
        return None
    labels = [label for label in (is_real, segment_ids) if label is not None]
    if pattern.kind == "full" and is_real is not None and segment_ids is None:
        rule: Rule = lambda b, h, q, k: is_real[b, k]  # noqa: E731
    else:
        rule = _rule(pattern, length, device, labels)
    rows, width = len(labels[0]) if labels else None, length * (2 if pattern.has_clean_half else 1)
    return create_block_mask(rule, rows, None, width, width, device=str(device))


def _rule(pattern: AttentionPattern, length: int, device: torch.device, labels: list[Tensor]) -> Rule:
    """Whether query q of row b sees key k, for any head. What it closes over is asked for by position."""
    block = offsets(labels, length, device) // (pattern.block_length or 1)

    def block_of(b: Tensor, i: Tensor) -> Tensor:
        return block[b, i] if labels else block[0, i]  # one relation for rows that are alike

    def same_document(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
        same = q == q
        for label in labels:
            same = same & (label[b, q] == label[b, k])
        return same

    if pattern.kind == "full":
        return lambda b, h, q, k: same_document(b, q, k)

    def of_row(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (block_of(b, q) >= block_of(b, k)) & same_document(b, q, k)

    if not pattern.has_clean_half:
        return of_row

    def of_halves(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """A noised query sees its own block noised and what stands before clean; a clean one, clean tokens alone."""
        from_noised, to_noised, q, k = q < length, k < length, q % length, k % length
        of_query, of_key = block_of(b, q), block_of(b, k)
        noised = torch.where(to_noised, of_query == of_key, of_query > of_key)
        clean = ~to_noised & (of_query >= of_key)
        return torch.where(from_noised, noised, clean) & same_document(b, q, k)

    return of_halves


@cache
def _compiled() -> Callable[..., Tensor]:
    """One kernel for all layers; inside a compiled block it is a part of that."""
    return torch.compile(flex_attention)


def attend_by_tiles(q: Tensor, k: Tensor, v: Tensor, tiles: BlockMask) -> Tensor:
    """Softmax attention of q [B H L d] over k, v [B G K d], of which H / G heads in a row share one."""
    attend: Any = _compiled() if q.device.type == "cuda" else flex_attention
    seen: Tensor = attend(q, k.to(q.dtype), v.to(q.dtype), block_mask=tiles, enable_gqa=k.shape[1] < q.shape[1])
    return seen


@cache
def has_tiles(device: torch.device, head_dim: int) -> bool:
    """Whether attention by tiles works here: on a GPU, where a trial gives what the table gives, backward too. It is in
    the precision of the forward that asks first.

    Kernels are compiled where they run, by what is installed there; a machine that cannot trains with the table.
    """
    if device.type != "cuda" or head_dim not in _HEAD_DIMS:
        return False
    try:
        return _agrees(device, head_dim)
    except Exception:  # noqa: BLE001 (whatever a compiler may raise)
        return False


def _agrees(device: torch.device, head_dim: int) -> bool:
    pattern, length = AttentionPattern("block_causal", 4), 256
    segments = torch.arange(length, device=device)[None] // 100
    q, k, v = torch.randn(3, 1, 2, length, head_dim, device=device).requires_grad_()
    table = visible_keys(pattern, length, device, None, segments)
    tiles = visible_tiles(pattern, length, device, None, segments)
    assert table is not None
    assert tiles is not None
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=table[:, None])
    found = attend_by_tiles(q, k, v, tiles)
    gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (expected, found)]
    pairs = [(expected, found), *zip(*gradients, strict=True)]
    return all(_is_near(a.float(), b.float()) for a, b in pairs)


def _is_near(expected: Tensor, found: Tensor) -> bool:
    """But for what TF32, or bf16 under autocast, rounds: a gradient is a sum of terms much larger than itself."""
    return bool((expected - found).abs().max() <= 2**-5 * expected.abs().max())
