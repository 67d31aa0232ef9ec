"""Section `decode`: how a canvas is filled. Torch-free; a request may override any of it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.decoding.revise import AncestralPolicy, EditingPolicy, RemaskingPolicy
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

_LAST_TIME = 1e-3  # Dream's eps: the time of the last step
MAX_ROWS = 64  # of an engine's batch, where nobody says otherwise
NO_SUFFIX = "the model reads from left to right and does not see what stands behind a hole"


def no_decoder(objective: AnyObjective, process: AnyNoise, model: ModelConfig) -> ConfigError | None:
    """The error that there is no decoder yet for such a model; None if there is one.

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


AnyRevisingPolicy = RemaskingPolicy | AncestralPolicy | EditingPolicy
AnyPolicy = Annotated[AnyUnmaskPolicy | AnyRevisingPolicy, Field(discriminator="type")]


class DecodeConfig(Frozen):
    """`steps_per_block` bounds the denoiser calls of a block; a policy may need fewer. A last block that is shorter
    than those before keeps their pace: it has as many steps fewer as it has fewer positions.

    A model trained in blocks is decoded in those: `block_length` must be theirs. An autoregressive one takes a token a
    call: blocks, steps and policy say nothing to it. Replaced tokens are decoded over the whole canvas in `steps`
    calls, whatever blocks and policy say.

    quota: how many positions a step must commit. even: ceil(open / steps left), LLaDA, arXiv:2502.09992, algorithm 4;
    by_time: the share that t leaves from one of `steps_per_block` even times to the next, rounded down, the rest at the
    end: Dream's; steps without a quota cost no call.
    cache: under full attention, approximations that compute a part of the row anew and take the keys and values of the
    rest as they were when the block began: `prefix` those before the block, `dual` those behind it too. Fast-dLLM,
    arXiv:2505.22618, section 3.2. refresh_every: calls in a block after which the whole row is computed again.
    What reads from left to right keeps settled keys always, exactly, whatever this says.
    guidance: w of classifier-free guidance: logits are led w times further away from those of the same row with all
    that was given masked, at two passes a call.
    grow_by: under full attention, an open end begins with so many positions and gets as many more whenever it is full
    without an end token, up to `max_tokens`; whole blocks at a time. null: it has `max_tokens` from the start.
    """

    policy: AnyPolicy = ThresholdPolicy()
    block_length: int = Field(16, ge=1)
    steps_per_block: int = Field(16, ge=1)
    steps: int = Field(64, ge=1, le=1 << 16, description="calls of ancestral decoding: replaced tokens")
    max_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    quota: Literal["even", "by_time"] = "even"
    cache: Literal["none", "prefix", "dual"] = "none"
    refresh_every: int | None = Field(None, ge=1)
    guidance: float = Field(0.0, ge=0, le=100)
    grow_by: int | None = Field(None, ge=1)

    @property
    def grows_by(self) -> int:
        """Positions that a canvas grows by, in whole blocks; 0 if it does not."""
        return -(-(self.grow_by or 0) // self.block_length) * self.block_length

    def told(self, pattern: AttentionPattern, is_ancestral: bool) -> dict[str, Any]:
        """What of this decided when tokens were committed, as plain data: of autoregression nothing did."""
        if is_ancestral:
            return {"policy": {"type": "ancestral", "steps": self.steps}, "block_length": None}
        if pattern.kind == "causal":
            return {"policy": None, "block_length": None}
        return self.model_dump(mode="json", include={"policy", "block_length"})

    @model_validator(mode="after")
    def _every_step_commits(self) -> Self:
        if self.steps_per_block > self.block_length and not isinstance(self.policy, RemaskingPolicy | AncestralPolicy):
            problem = f"must be in [1, block_length={self.block_length}]"
            raise FieldProblem(
                "steps_per_block", problem, self.steps_per_block, "every step commits at least one token"
            )
        if self.refresh_every is not None and self.cache == "none":
            problem = "says when a cache is renewed, and cache is none"
            raise FieldProblem("refresh_every", problem, self.refresh_every, "cache=prefix or cache=dual")
        return self

    def steps_of(self, width: int) -> int:
        """Steps of a block of so many positions, which others stand before."""
        return -(-self.steps_per_block * width // self.block_length)

    def quota_of(self, number: int, step: int, steps: int) -> int:
        """How many of `number` open positions step `step`, from 0, of a block's `steps` must commit."""
        left = steps - step
        if left <= 1:
            return number
        if self.quota == "even":
            return -(-number // left)
        t, s = (1 - (1 - _LAST_TIME) * k / steps for k in (step, step + 1))
        return int(number * (1 - s / t))
