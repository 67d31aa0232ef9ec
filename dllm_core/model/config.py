"""Sizes of a denoiser, and what they cost in parameters and floating-point operations."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.model.pattern import FULL, AttentionPattern

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"  # a denoiser's folder
LAYOUT_NAME = "foreign.json"  # beside them where they were imported: how to write them as they came
TIME_DIM = 128  # width of the embedding of t, whatever the model's: MDLM's cond_dim


class ExpertsConfig(Frozen):
    """Section `model.experts`: a layer's feed-forward part is a choice of small ones, another for every token.

    The router scores experts; the best `groups_per_token` of `num_groups` groups are kept, each judged by its two best
    experts, and of those the best `experts_per_token`. DeepSeek-V3, arXiv:2412.19437, section 2.1.2.
    """

    num_experts: int = Field(8, ge=2)
    experts_per_token: int = Field(2, ge=1)
    expert_ffn_dim: int = Field(64, ge=1)
    num_shared_experts: int = Field(0, ge=0, description="so many experts' width that every token meets")
    first_dense_layers: int = Field(0, ge=0, description="layers with a plain feed-forward part of ffn_dim")
    router: Literal["softmax", "sigmoid"] = "softmax"
    num_groups: int = Field(1, ge=1)
    groups_per_token: int = Field(1, ge=1)
    routed_scaling: float = Field(1.0, gt=0, description="what the experts' weights are multiplied by")
    normalise: bool = Field(True, description="the weights of a token's experts sum to routed_scaling")
    selection_bias: bool = Field(False, description="a number an expert that counts in the choice alone")

    @model_validator(mode="after")
    def _choices_fit(self) -> Self:
        if self.num_experts % self.num_groups:
            raise FieldProblem("num_groups", f"must divide num_experts={self.num_experts}", self.num_groups)
        if self.groups_per_token > self.num_groups:
            raise FieldProblem("groups_per_token", f"must be <= num_groups={self.num_groups}", self.groups_per_token)
        eligible = self.groups_per_token * (self.num_experts // self.num_groups)
        if self.experts_per_token > eligible:
            problem = f"must be <= {eligible}, the experts of groups_per_token groups"
            raise FieldProblem("experts_per_token", problem, self.experts_per_token)
        return self

    @property
    def shared_ffn_dim(self) -> int:
        """Width of what every token meets."""
        return self.num_shared_experts * self.expert_ffn_dim


class ModelConfig(Frozen):
    """Section `model`: a pre-norm transformer with RMSNorm, RoPE and SwiGLU."""

    dim: int = Field(128, ge=8)
    layers: int = Field(4, ge=1)
    heads: int = Field(4, ge=1)
    ffn_dim: int = Field(384, ge=8)
    rope_theta: float = Field(10_000.0, gt=1)
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm: bool = Field(True, description="RMSNorm on queries and keys: allows larger learning rates")
    tie_embeddings: bool = True
    time_conditioning: bool = Field(False, description="t shifts, scales and gates every block (adaLN)")
    kv_heads: int | None = Field(None, ge=1, description="heads of keys and values, each for several queries'")
    head_width: int | None = Field(None, ge=2, description="null: dim / heads")
    qkv_bias: bool = False
    rope_fraction: float = Field(1.0, gt=0, le=1, description="of a head's width that turns with the position")
    scale_embeddings: bool = Field(True, description="tied embeddings are read times sqrt(dim)")
    shifted: bool = Field(False, description="the last layer at i - 1 tells token i, as in Dream; not under `causal`")
    experts: ExpertsConfig | None = None

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.head_width is None and (self.dim % self.heads or (self.dim // self.heads) % 2):
            raise FieldProblem("heads", f"must divide dim={self.dim} into even parts", self.heads, "RoPE turns pairs")
        if self.heads % self.num_kv_heads:
            raise FieldProblem("kv_heads", f"must divide heads={self.heads}", self.kv_heads)
        if self.rope_dim < 2 or self.rope_dim % 2:
            problem = f"turns {self.rope_dim} of {self.head_dim} dimensions, must be an even number"
            raise FieldProblem(
                "head_width" if self.rope_fraction == 1 else "rope_fraction", problem, self.rope_fraction
            )
        if self.experts is not None and self.experts.first_dense_layers >= self.layers:
            problem = f"must be below layers={self.layers}"
            raise FieldProblem("experts.first_dense_layers", problem, self.experts.first_dense_layers)
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What a fingerprint holds: fields that came later are left out where they say nothing."""
        values = self.model_dump(mode="json")
        return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.head_width or self.dim // self.heads

    @property
    def num_kv_heads(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def qkv_dim(self) -> int:
        """Width of a token's queries, keys and values together."""
        return (self.heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def rope_dim(self) -> int:
        """Dimensions of a head that turn with the position."""
        return int(self.head_dim * self.rope_fraction)

    def can_keep(self, pattern: AttentionPattern) -> bool:
        """Whether logits of new positions need nothing of settled ones but their keys and values."""
        return pattern.kind == "causal" or (pattern.kind == "block_causal" and not self.shifted)

    def has_experts(self, layer: int) -> bool:
        """Whether this layer's feed-forward part is a mixture."""
        return self.experts is not None and layer >= self.experts.first_dense_layers

    def _matrices(self, *, met: bool) -> int:
        """Weights of all blocks' matrices; met: only those that one token meets."""
        attention = self.dim * (self.qkv_dim + self.heads * self.head_dim)
        dense = 3 * self.dim * self.ffn_dim
        if self.experts is None:
            return self.layers * (attention + dense)
        own, first = self.experts, self.experts.first_dense_layers
        number = own.experts_per_token if met else own.num_experts
        width = number * own.expert_ffn_dim + own.shared_ffn_dim
        mixture = self.dim * own.num_experts + 3 * self.dim * width
        return self.layers * attention + first * dense + (self.layers - first) * mixture

    def num_parameters(self, vocab_size: int) -> int:
        """Trainable parameters."""
        norms = 2 * self.dim + (2 * self.head_dim if self.qk_norm else 0) + (self.qkv_dim if self.qkv_bias else 0)
        blocks = self._matrices(met=False) + self.layers * norms
        time = TIME_DIM * (2 * TIME_DIM + (6 * self.layers + 2) * self.dim) if self.time_conditioning else 0
        return blocks + self.dim + vocab_size * self.dim * (1 if self.tie_embeddings else 2) + time

    def flops_per_token(self, vocab_size: int, seq_len: int, pattern: AttentionPattern = FULL) -> int:
        """Forward and backward for one of a row's L tokens: 6 a matrix weight it meets + 12 d a key seen, each layer.

        d is the width of all heads together; of experts a token meets its own. With full attention that is PaLM's
        12 L d (appendix B). Under other patterns only pairs that see each other count, whatever a kernel computes
        besides; the clean half of block diffusion's [xt ; x0] meets the blocks' matrices once more. The head is counted
        for every position although it runs at noised ones only, as published MFUs do; isolated documents count as one;
        time conditioning, once a row where t is the row's, is left out.
        """
        halves = 2 if pattern.has_clean_half else 1
        matrices = halves * self._matrices(met=True) + vocab_size * self.dim
        width = self.heads * self.head_dim
        return 6 * matrices + 12 * self.layers * width * pattern.num_pairs(seq_len) // seq_len


_LATER = {
    name: ModelConfig.model_fields[name].default
    for name in ("kv_heads", "head_width", "qkv_bias", "rope_fraction", "scale_embeddings", "shifted", "experts")
}


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
