"""Sizes of a denoiser, and what they cost in parameters and floating-point operations."""

from typing import Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.model.pattern import FULL, AttentionPattern

TIME_DIM = 128  # width of the embedding of t, whatever the model's: MDLM's cond_dim


class ModelConfig(Frozen):
    """Section `model`: a pre-norm transformer with RMSNorm, RoPE and SwiGLU, no biases."""

    dim: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn_dim: int = Field(384, ge=8)
    rope_theta: float = Field(10_000.0, gt=1)
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm: bool = Field(True, description="RMSNorm on queries and keys: allows larger learning rates")
    tie_embeddings: bool = True
    time_conditioning: bool = Field(False, description="t shifts, scales and gates every block (adaLN)")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise FieldProblem("heads", f"must divide dim={self.dim} into even parts", self.heads, "RoPE turns pairs")
        return self

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.heads

    def num_parameters(self, vocab_size: int) -> int:
        """Trainable parameters."""
        norms = 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0)
        block = 4 * self.dim**2 + 3 * self.dim * self.ffn_dim + norms
        time = TIME_DIM * (2 * TIME_DIM + (6 * self.layers + 2) * self.dim) if self.time_conditioning else 0
        return self.layers * block + self.dim + vocab_size * self.dim * (1 if self.tie_embeddings else 2) + time

    def flops_per_token(self, vocab_size: int, seq_len: int, pattern: AttentionPattern = FULL) -> int:
        """Forward and backward for one of a row's L tokens: 6 a matrix weight it meets + 12 d a key seen, each layer.

        With full attention that is PaLM's 12 L d (appendix B). Under other patterns only pairs that see each other
        count, whatever a kernel computes besides; the clean half of block diffusion's [xt ; x0] meets the blocks'
        matrices once more. The head is counted for every position although it runs at noised ones only, as published
        MFUs do; isolated documents count as one; time conditioning, once a row where t is the row's, is left out.
        """
        halves = 2 if pattern.has_clean_half else 1
        matrices = halves * self.layers * (4 * self.dim**2 + 3 * self.dim * self.ffn_dim) + vocab_size * self.dim
        return 6 * matrices + 12 * self.layers * self.dim * pattern.num_pairs(seq_len) // seq_len


class DenoiserConfig(Frozen):
    """What `config.json` of a bundle holds: sizes, vocabulary, special ids and context."""

    model_type: str = "dllm"
    model: ModelConfig
    vocab_size: int = Field(ge=1)
    context_length: int = Field(ge=1)
    mask_id: int = Field(ge=0)
    eos_id: int = Field(ge=0)
    pad_id: int = Field(ge=0)

    @model_validator(mode="after")
    def _ids_are_in_the_vocabulary(self) -> Self:
        for field in ("mask_id", "eos_id", "pad_id"):
            if getattr(self, field) >= self.vocab_size:
                raise FieldProblem(field, f"must be below vocab_size={self.vocab_size}", getattr(self, field))
        return self
