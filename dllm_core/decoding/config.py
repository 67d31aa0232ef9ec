"""Section `decode`: how a canvas is filled. Torch-free; a request may override any of it."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen
from dllm_core.decoding.unmask import AnyUnmaskPolicy, ThresholdPolicy


class DecodeConfig(Frozen):
    """`steps_per_block` bounds the denoiser calls of a block; a policy may need fewer.

    A model trained in blocks is decoded in those: `block_length` must be theirs. An autoregressive one takes a token a
    call: blocks, steps and policy say nothing to it. `cache` names approximations; an exact one needs no setting.
    """

    policy: AnyUnmaskPolicy = ThresholdPolicy()
    block_length: int = Field(16, ge=1)
    steps_per_block: int = Field(16, ge=1)
    max_tokens: int = Field(48, ge=1)
    temperature: float = Field(0.0, ge=0, le=10)
    top_p: float = Field(1.0, gt=0, le=1)
    cache: Literal["none"] = "none"

    @model_validator(mode="after")
    def _every_step_commits(self) -> Self:
        if self.steps_per_block > self.block_length:
            problem = f"must be in [1, block_length={self.block_length}]"
            raise FieldProblem(
                "steps_per_block", problem, self.steps_per_block, "every step commits at least one token"
            )
        return self
