"""Section `objective` of a recipe; torch-free, so that a recipe is checked in no time."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen

Normalize = Literal["tokens", "noised", "answer"]


class DiffusionOptions(Frozen):
    """What both diffusion objectives have. The defaults give the NELBO itself, which every process has.

    weight: the NELBO's; none (plain cross-entropy); or by how much clean context stands near a mask (CART).
    normalize: what the sum is divided by: counted tokens; noised ones; or each row by its own counted tokens, then
    by rows, so that a short answer weighs as much as a long one.
    """

    weight: Literal["nelbo", "none", "context"] = "nelbo"
    max_weight: float | None = Field(None, gt=0, description="clips the NELBO's weight in training, never in figures")
    context_rate: float = Field(0.3, gt=0, lt=1, description="`context`: how fast a neighbour's help fades")
    normalize: Normalize = "tokens"
    complementary: bool = Field(False, description="learn from a mask and its complement in one step")

    @model_validator(mode="after")
    def _clipped_is_the_nelbos(self) -> Self:
        if self.max_weight is not None and self.weight != "nelbo":
            raise FieldProblem("max_weight", f"clips weight=nelbo, not {self.weight}", self.max_weight, "leave it out")
        return self

    @property
    def only_for_masks(self) -> str | None:
        """The first option that says something about masks, by its name."""
        plain = type(self)()
        names = ("weight", "max_weight", "complementary")
        return next((name for name in names if getattr(self, name) != getattr(plain, name)), None)


class DiffusionConfig(DiffusionOptions):
    """Diffusion over the whole row: masked, uniform-state or hybrid, as the noise process says."""

    type: Literal["diffusion"] = "diffusion"


class BlockDiffusionConfig(DiffusionOptions):
    """Diffusion inside blocks of `noise.block_length` tokens, left to right over blocks. BD3-LM, arXiv:2503.09573."""

    type: Literal["block_diffusion"] = "block_diffusion"


class AutoregressiveConfig(Frozen):
    """GPT: every token from what stands before it."""

    type: Literal["autoregressive"] = "autoregressive"
    normalize: Literal["tokens", "answer"] = "tokens"


class MaskedLMConfig(Frozen):
    """BERT, arXiv:1810.04805: of a share `rate` of tokens, most are masked, some replaced, some left; all are asked."""

    type: Literal["masked_lm"] = "masked_lm"
    rate: float = Field(0.15, gt=0, le=1)
    masked: float = Field(0.8, ge=0, le=1, description="share of the chosen that become the mask")
    replaced: float = Field(0.1, ge=0, le=1, description="share of the chosen that become another token")

    @model_validator(mode="after")
    def _shares_fit(self) -> Self:
        if self.masked + self.replaced > 1:
            raise FieldProblem("replaced", f"masked={self.masked} leaves less", self.replaced, "their sum is at most 1")
        return self


def _diffusion_unless_said(section: Any) -> Any:
    return {"type": "diffusion", **section} if isinstance(section, dict) else section


AnyObjective = Annotated[
    DiffusionConfig | BlockDiffusionConfig | AutoregressiveConfig | MaskedLMConfig,
    Field(discriminator="type"),
    BeforeValidator(_diffusion_unless_said),
]
