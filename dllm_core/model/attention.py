"""Self-attention with rotary positions, over whatever keys a query may see."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.model.config import ModelConfig
from dllm_core.model.layers import Linear, RMSNorm

_SHORT = 256


def rope_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """The pair (cos, sin), each fp32 [... head_dim], at positions [...]; half-rotation layout. arXiv:2104.09864."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions[..., None].float() * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x [B H L d] by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Every position sees the positions that `attention` allows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.out = Linear(config.dim, config.dim, scale=(2 * config.layers) ** -0.5)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Tensor | None, is_causal: bool) -> Tensor:
        """[B L D] -> [B L D]. attention: bool [B|1 1 L|1 L], True where a query may see a key; None: all see all.

        cos, sin: [L d] or, where rows have positions of their own, [B 1 L d]. is_causal, without `attention`: a query
        sees itself and what stands before it.
        """
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen = _attend(q, k, v.to(q.dtype), attention, is_causal)
        mixed: Tensor = self.out(seen.transpose(1, 2).reshape(rows, length, -1))
        return mixed


def _attend(q: Tensor, k: Tensor, v: Tensor, attention: Tensor | None, is_causal: bool = False) -> Tensor:
    """Softmax attention [B H L d]. Torch's fused kernel, except for short rows on a CPU.

    Its CPU backward took 39 % of a training step at [8 8 64 16] in bf16; the plain products take a sixth of that. The
    mask is added: filling the scores takes 1.3 times as long at [8 4 128 32], nearly all of it in the backward.
    """
    length = q.shape[-2]
    if q.device.type != "cpu" or length > _SHORT:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=attention, is_causal=is_causal)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if is_causal:
        attention = torch.ones(length, length, dtype=torch.bool).tril()
    if attention is not None:
        scores = scores + torch.zeros(attention.shape, dtype=q.dtype).masked_fill(~attention, -torch.inf)
    seen: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return seen
