"""Sizes of a denoiser, and what they cost in parameters and floating-point operations."""

from typing import Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen


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
        return self.layers * block + self.dim + vocab_size * self.dim * (1 if self.tie_embeddings else 2)

    def flops_per_token(self, vocab_size: int, seq_len: int) -> int:
        """Forward and backward: 6 a matrix weight + 12 L d for each layer's attention (PaLM, appendix B).

        The head is counted for every position although it runs at noised ones only, as published MFUs do.
        """
        matrices = self.layers * (4 * self.dim**2 + 3 * self.dim * self.ffn_dim) + vocab_size * self.dim
        return 6 * matrices + 12 * self.layers * seq_len * self.dim


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
