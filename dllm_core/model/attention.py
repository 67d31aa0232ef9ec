"""Self-attention with rotary positions, over whatever keys a query may see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.model.cache import LayerKeyValues, NewPositions
from dllm_core.model.config import ModelConfig
from dllm_core.model.layers import Linear, RMSNorm

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_SHORT = 256
_CHUNK = 128


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """The pair (cos, sin), each fp32 [... head_dim], at positions [...]; half-rotation layout. arXiv:2104.09864."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + r/2) of the first r dimensions of x [B H L d], as many as the tables have, by their
    positions' angles; the others stay. Partial RoPE: GPT-NeoX, arXiv:2204.06745.
    """
    if cos.shape[-1] < x.shape[-1]:
        return torch.cat([rotate(x[..., : cos.shape[-1]], cos, sin), x[..., cos.shape[-1] :]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


@dataclass(frozen=True)
class Strip:
    """Rows that lie behind one another in a joined batch, as a batch of their own has them.

    shape: (B, W); new: where rows that keep keys and values have theirs; attention: as `Attention` takes it beside.
    """

    shape: tuple[int, int]
    attention: Tensor | None
    new: NewPositions | None


@dataclass(frozen=True)
class JoinedStrips:
    """All that one joined forward takes."""

    strips: Sequence[Strip]

    def layer(self, number: int) -> "JoinedRows":
        """The strips as one layer takes them."""
        return JoinedRows(self.strips, number)


@dataclass(frozen=True)
class JoinedRows:
    """Strips of one layer: what is done a position is done for all at once, attention for each strip alone."""

    strips: Sequence[Strip]
    number: int

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[1 H|G N d] each -> [1 N H d]. Positions behind the last strip are padding and get zeros."""
        seen, begin = [], 0
        for strip in self.strips:
            stop = begin + strip.shape[0] * strip.shape[1]
            own = [part[0, :, begin:stop].view(-1, *strip.shape, q.shape[-1]).transpose(0, 1) for part in (q, k, v)]
            if strip.new is not None:
                own[1:] = strip.new.layer(self.number).extend(own[1], own[2])
            found = _attend(own[0], own[1], own[2], strip.attention, is_kept=strip.new is not None)
            seen.append(found.transpose(1, 2).flatten(0, 1))
            begin = stop
        return functional.pad(torch.cat(seen), (0, 0, 0, 0, 0, q.shape[2] - begin))[None]


class Attention(nn.Module):
    """Every position sees the positions that `attention` allows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = [config.heads, config.num_kv_heads, config.num_kv_heads]
        self.qkv = Linear(config.dim, config.qkv_dim, bias=config.qkv_bias)
        self.out = Linear(config.heads * config.head_dim, config.dim, scale=(2 * config.layers) ** -0.5)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attention: "Tensor | BlockMask | None",
        is_causal: bool,
        cache: LayerKeyValues | JoinedRows | None = None,
    ) -> Tensor:
        """[B L D] -> [B L H*d], before the last product. cos, sin: as `projected` takes them; the others as `mixed`."""
        rows = cache.num_rows if isinstance(cache, LayerKeyValues) else None
        return self.mixed(*self.projected(x, cos, sin, rows), attention, is_causal, cache, len(x))

    def projected(self, x: Tensor, cos: Tensor, sin: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """[B L D] -> queries [B H L d], keys and values [B G L d], the first two turned to their positions; of the
        first `rows` rows, where those behind are padding. cos, sin: [L d] or, where rows have their own, [B 1 L d].
        """
        qkv = self.qkv(x).view(*x.shape[:2], -1, self.head_dim)[:rows]
        q, k, v = (part.transpose(1, 2) for part in qkv.split(self.heads, dim=2))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q, k, v.to(q.dtype)

    def mixed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attention: "Tensor | BlockMask | None",
        is_causal: bool,
        cache: LayerKeyValues | JoinedRows | None,
        rows: int,
    ) -> Tensor:
        """Values mixed by what each query sees [B L H*d], zeros behind them to so many rows.

        attention: bool [B|1 1 L|1 L], True where a query may see a key, or as much by tiles; None: all see all.
        is_causal, without `attention`: a query sees itself and what stands before it. With a cache, whose keys stand
        before the new ones, attention is its sum to scores [B 1 L K]. Joined rows are one row and say themselves what
        is seen.
        """
        if isinstance(cache, JoinedRows):
            return cache.attend(q, k, v).flatten(2)
        if cache is not None:
            k, v = cache.extend(k, v)
        if attention is None or isinstance(attention, Tensor):
            seen = _attend(q, k, v, attention, is_causal, is_kept=cache is not None)
        else:
            from dllm_core.model.flex import attend_by_tiles

            seen = attend_by_tiles(q, k, v, attention)
        seen = seen.transpose(1, 2).flatten(2)
        missing = rows - len(seen)
        return functional.pad(seen, (0, 0, 0, 0, 0, missing)) if missing else seen


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attention: Tensor | None, is_causal: bool = False, *, is_kept: bool = False
) -> Tensor:
    """Softmax attention of q [B H L d] over k, v [B G K d]: torch's fused kernel, except on a CPU for short rows and
    over kept keys (is_kept; attention is then added to scores, and may have rows for queries of padding). H / G heads
    in a row share keys and values (arXiv:2305.13245), which are copied for one layer at a time: kernels that take
    fewer heads of keys take no mask.

    Its CPU backward took 39 % of a training step at [8 8 64 16] in bf16; the plain products take a sixth of that. The
    mask is added: filling the scores takes 1.3 times as long at [8 4 128 32], nearly all of it in the backward.
    """
    queries, length = q.shape[-2], k.shape[-2]
    if k.shape[1] < q.shape[1]:
        k, v = (part.repeat_interleave(q.shape[1] // part.shape[1], dim=1) for part in (k, v))
    if is_kept and attention is not None:
        q, attention = functional.pad(q, (0, 0, 0, attention.shape[-2] - queries)), attention.to(q.dtype)
    if q.device.type != "cpu" or (length > _SHORT and not is_kept):
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=attention, is_causal=is_causal)
        return seen[..., :queries, :]
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if is_causal:
        attention = torch.ones(length, length, dtype=torch.bool).tril()
    if attention is not None:
        added = attention if is_kept else torch.zeros_like(attention, dtype=q.dtype).masked_fill(~attention, -torch.inf)
        scores = scores + added
    return _mixed(scores.softmax(-1).to(v.dtype), v)[..., :queries, :]


def _mixed(weights: Tensor, v: Tensor) -> Tensor:
    """The product of weights [B H L K] and v [B H K d]; where bits are promised, 128 keys at a time.

    How a CPU's matrix product splits a longer sum depends on its length: keys that no query sees would count.
    """
    if weights.shape[-1] <= _CHUNK or torch.is_grad_enabled():
        return weights @ v
    mixed = weights[..., :_CHUNK] @ v[..., :_CHUNK, :]
    for first in range(_CHUNK, weights.shape[-1], _CHUNK):
        mixed += weights[..., first : first + _CHUNK] @ v[..., first : first + _CHUNK, :]
    return mixed
