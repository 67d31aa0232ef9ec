"""Denoiser: noised ids -> logits over clean ids, every position seeing the whole row."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from dllm_core.model.attention import Attention, rope_tables
from dllm_core.model.config import DenoiserConfig, ModelConfig
from dllm_core.model.layers import Linear, RMSNorm, SwiGLU

# Below 12 rows (2 threads; 4 with one) a CPU's matrix product takes other kernels, which sum in another order: the last
# bit of a row would depend on how many others are read with it. Measured for fan-ins of 32 to 512.
_MIN_ROWS = 16


class Block(nn.Module):
    """x + attention(norm(x)), then x + ffn(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.norm2 = RMSNorm(config.dim, config.norm_eps)
        self.ffn = SwiGLU(config.dim, config.ffn_dim, scale=(2 * config.layers) ** -0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Tensor | None) -> Tensor:
        """[B L D] -> [B L D]."""
        x = x + self.attention(self.norm1(x), cos, sin, attention)
        out: Tensor = x + self.ffn(self.norm2(x))
        return out


class Denoiser(nn.Module):
    """x_theta. No time conditioning: for absorbing noise the masks themselves tell t (MDLM, section 3.3)."""

    def __init__(self, config: DenoiserConfig) -> None:
        super().__init__()
        model = config.model
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, model.dim)
        nn.init.normal_(self.embed.weight, std=model.dim**-0.5 if model.tie_embeddings else 1.0)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.layers))
        self.norm = RMSNorm(model.dim, model.norm_eps)
        self.head = Linear(model.dim, config.vocab_size)
        if model.tie_embeddings:
            self.head.weight = self.embed.weight
        self._tables: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        input_ids: Tensor,
        is_real: Tensor | None = None,
        read: Tensor | None = None,
        segment_ids: Tensor | None = None,
    ) -> Tensor:
        """Logits for input_ids [B L].

        is_real: bool [B L], False at padding, which no position sees. read: bool [B L]; then the head runs at
        those positions only and the result is [read.sum() V] in row-major order, else [B L V]. segment_ids: int
        [B L]; a position sees its own segment only. Positions need not restart: RoPE tells distances alone.
        """
        model = self.config.model
        cos, sin = self._rope(input_ids.shape[1], input_ids.device)
        attention = None if is_real is None else is_real[:, None, None, :]
        if segment_ids is not None:
            same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None]
            attention = same if attention is None else attention & same
        x = self.embed(input_ids) * (model.dim**0.5 if model.tie_embeddings else 1.0)
        for block in self.blocks:
            x = block(x, cos, sin, attention)
        if read is None:
            logits: Tensor = self.head(self.norm(x))
            return logits
        x = x[read]
        missing = max(0, _MIN_ROWS - len(x)) if not torch.is_grad_enabled() else 0
        return self.head(self.norm(functional.pad(x, (0, 0, 0, missing))))[: len(x)]  # type: ignore[no-any-return]

    def _rope(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The first `length` positions of tables that are kept for as long as they fit."""
        if self._tables is None or self._tables[0].shape[0] < length or self._tables[0].device != device:
            model, longest = self.config.model, max(length, self.config.context_length)
            with torch.inference_mode(False):  # else a model that was evaluated first could not be trained
                self._tables = rope_tables(longest, model.head_dim, model.rope_theta, device)
        cos, sin = self._tables
        return cos[:length], sin[:length]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embed.weight.device
