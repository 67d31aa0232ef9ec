"""Section `objective` of a recipe; torch-free, so that a recipe is checked in no time."""

from typing import Literal

from pydantic import Field

from dllm_core.config.base import Frozen


class MaskedDiffusionConfig(Frozen):
    """Masked diffusion's NELBO; `max_weight` clips the weight of early times in training, never in evaluation."""

    type: Literal["masked_diffusion"] = "masked_diffusion"
    max_weight: float | None = Field(None, gt=0)
