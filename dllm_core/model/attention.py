"""Bidirectional self-attention with rotary positions."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.model.config import ModelConfig
from dllm_core.model.layers import Linear, RMSNorm

_SHORT = 256


def rope_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The pair (cos, sin), each fp32 [length head_dim], half-rotation layout. RoFormer, arXiv:2104.09864."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.arange(length, device=device, dtype=torch.float32)[:, None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (i, i + d/2) of x [B H L d] by their positions' angles."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Every position sees every position that `attention` allows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.head_dim = config.heads, config.head_dim
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.out = Linear(config.dim, config.dim, scale=(2 * config.layers) ** -0.5)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Tensor | None) -> Tensor:
        """[B L D] -> [B L D]. attention: bool [B 1 1|L L], True where a query may see a key; None: all see all."""
        rows, length, _ = x.shape
        qkv = self.qkv(x).view(rows, length, 3, self.heads, self.head_dim)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        seen = _attend(q, k, v.to(q.dtype), attention)
        mixed: Tensor = self.out(seen.transpose(1, 2).reshape(rows, length, -1))
        return mixed


def _attend(q: Tensor, k: Tensor, v: Tensor, attention: Tensor | None) -> Tensor:
    """Softmax attention [B H L d]. Torch's fused kernel, except for short rows on a CPU.

    Its CPU backward took 39 % of a training step at [8 8 64 16] in bf16; the plain products take a sixth of that.
    """
    length = q.shape[-2]
    if q.device.type != "cpu" or length > _SHORT:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=attention)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if attention is not None:
        scores = scores.masked_fill(~attention, -torch.inf)
    seen: Tensor = scores.softmax(-1).to(v.dtype) @ v
    return seen
