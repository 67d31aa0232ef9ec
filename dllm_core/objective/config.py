"""Section `objective` of a recipe; torch-free, so that a recipe is checked in no time."""

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen

Normalize = Literal["tokens", "noised", "answer"]


class WarmupStage(Frozen):
    """So many steps in blocks of so many tokens; blocks as long as a row are diffusion over whole rows."""

    block_length: int = Field(ge=1)
    steps: int = Field(ge=1, le=1 << 40)


class DiffusionOptions(Frozen):
    """What both diffusion objectives have. The defaults give the NELBO itself, which every process has.

    weight: the NELBO's; none (plain cross-entropy); or by how much clean context a mask sees near it (CART).
    normalize: what the sum is divided by: counted tokens; noised ones; or each row by its own counted tokens, then
    by rows, so that a short answer weighs as much as a long one.
    block_warmup: stages before the objective itself; a model that was autoregressive begins with blocks of one token.
    """

    weight: Literal["nelbo", "none", "context"] = "nelbo"
    max_weight: float | None = Field(None, gt=0, description="clips the NELBO's weight in training, never in figures")
    context_rate: float = Field(0.3, gt=0, lt=1, description="`context`: how fast a neighbour's help fades")
    normalize: Normalize = "tokens"
    complementary: bool = Field(False, description="learn from a mask and its complement in one step")
    block_warmup: tuple[WarmupStage, ...] = Field((), description="other blocks in the first steps")

    @property
    def identity(self) -> dict[str, Any]:
        """What a fingerprint holds: a field that came later is left out where it says nothing."""
        return self.model_dump(mode="json", exclude=set() if self.block_warmup else {"block_warmup"})

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


class PreferenceConfig(Frozen):
    """Of two answers the preferred one becomes likelier than under the weights that training starts from.

    VRPO of LLaDA 1.5, arXiv:2505.19223: DPO on bounds, of a masked diffusion over whole rows or, with
    `noise.block_length`, in blocks.
    """

    type: Literal["preference"] = "preference"
    beta: float = Field(0.1, gt=0, description="how much a nat of margin counts; a small one drifts further")
    draws: int = Field(4, ge=1, le=1024, description="times of each pair in a step, one mask each")
    sft_weight: float = Field(0.0, ge=0, description="nats a token of the chosen answer that are added to the loss")


def _diffusion_unless_said(section: Any) -> Any:
    return {"type": "diffusion", **section} if isinstance(section, dict) else section


AnyObjective = Annotated[
    DiffusionConfig | BlockDiffusionConfig | AutoregressiveConfig | MaskedLMConfig | PreferenceConfig,
    Field(discriminator="type"),
    BeforeValidator(_diffusion_unless_said),
]


def model_kind(objective: AnyObjective, block_length: int | None) -> AnyObjective:
    """What a model is to who scores, decodes or serves it: tuned by preference, the diffusion that it was before."""
    if isinstance(objective, PreferenceConfig):
        return DiffusionConfig() if block_length is None else BlockDiffusionConfig()
    return objective
