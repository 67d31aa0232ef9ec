"""Section `decode`: how a canvas is filled. Torch-free; a request may override any of it."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.decoding.unmask import AnyUnmaskPolicy, ThresholdPolicy
from dllm_core.errors import ConfigError
from dllm_core.model.config import ModelConfig
from dllm_core.model.pattern import CAUSAL, FULL, AttentionPattern
from dllm_core.noise.process import AnyNoise
from dllm_core.objective.config import (
    AnyObjective,
    AutoregressiveConfig,
    BlockDiffusionConfig,
    DiffusionConfig,
    MaskedLMConfig,
)

NO_SUFFIX = "the model reads from left to right and does not see what stands behind a hole"


def no_decoder(objective: AnyObjective, process: AnyNoise, model: ModelConfig) -> ConfigError | None:
    """What says that there is no decoder yet for such a model; None if there is.

    Decoded are autoregression, whose model reads no noise and no t; replaced tokens over whole rows; and masks, over
    whole rows or in blocks, by models that are not told t.
    """
    problem, remedy = "there is no decoder for such a model yet", "it can be trained and evaluated"
    if isinstance(objective, AutoregressiveConfig) or is_ancestral(objective, process):
        return None
    if isinstance(objective, MaskedLMConfig):
        return ConfigError("objective.type", problem, objective.type, remedy)
    if process.replaces:
        return ConfigError("noise.process.type", problem, process.type, remedy)
    if model.time_conditioning:
        return ConfigError("model.time_conditioning", problem, True, remedy)
    return None


def is_ancestral(objective: AnyObjective, process: AnyNoise) -> bool:
    """Whether a model is decoded by running its noise backwards, where a token that stands may still change."""
    return isinstance(objective, DiffusionConfig) and process.replaces


def decoding_pattern(objective: AnyObjective, block_length: int | None) -> AttentionPattern:
    """Whom a position sees in decoding, of a model that `no_decoder` lets pass. block_length: the noise's."""
    if isinstance(objective, AutoregressiveConfig):
        return CAUSAL
    if isinstance(objective, BlockDiffusionConfig):
        return AttentionPattern("block_causal", block_length)
    return FULL


class DecodeConfig(Frozen):
    """`steps_per_block` bounds the denoiser calls of a block; a policy may need fewer.

    A model trained in blocks is decoded in those: `block_length` must be theirs. An autoregressive one takes a token a
    call: blocks, steps and policy say nothing to it. Replaced tokens are decoded over the whole canvas in `steps`
    calls, whatever blocks and policy say. `cache` names approximations; an exact one needs no setting.
    """

    policy: AnyUnmaskPolicy = ThresholdPolicy()
    block_length: int = Field(16, ge=1)
    steps_per_block: int = Field(16, ge=1)
    steps: int = Field(64, ge=1, le=1 << 16, description="calls of ancestral decoding: replaced tokens")
    max_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    cache: Literal["none"] = "none"

    def told(self, pattern: AttentionPattern, is_ancestral: bool) -> dict[str, Any]:
        """What of this decided when tokens were committed, as plain data: of autoregression nothing did."""
        if is_ancestral:
            return {"policy": {"type": "ancestral", "steps": self.steps}, "block_length": None}
        if pattern.kind == "causal":
            return {"policy": None, "block_length": None}
        return self.model_dump(mode="json", include={"policy", "block_length"})

    @model_validator(mode="after")
    def _every_step_commits(self) -> Self:
        if self.steps_per_block > self.block_length:
            problem = f"must be in [1, block_length={self.block_length}]"
            raise FieldProblem(
                "steps_per_block", problem, self.steps_per_block, "every step commits at least one token"
            )
        return self
