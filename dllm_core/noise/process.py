"""NoiseProcess: what every forward process promises, and the recipe section that names one.

A recipe does not know the mask id (the tokenizer does), so a section is *bound* to a vocabulary before use.
"""

from typing import Annotated, Any, ClassVar, Literal, Protocol

from pydantic import BeforeValidator, Field, model_validator

from dllm_core.config.base import Frozen
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.arrays import Array
from dllm_core.noise.hybrid import HybridProcess
from dllm_core.noise.law import Law
from dllm_core.noise.schedule import AnySchedule, LinearSchedule
from dllm_core.noise.uniform import UniformProcess


class NoiseProcess(Protocol):
    """q(xt | x0): a frozen value; uniforms come in as arrays. `interpolating.py` says how p(x0) is plugged in."""

    replaces: ClassVar[bool]
    """Whether noise may be another token, so that a clean look proves nothing and `corrupt` needs v."""

    @property
    def mask_id(self) -> int:
        """The id that no text holds."""

    def corrupt(self, x0: Array, t: Array, u: Array, v: Array | None = None) -> Array:
        """Draw xt ~ q(. | x0); numpy and torch give the same bits.

        x0 [B L] ids, t [B L] or [B 1] in [0, 1], u [B L] in [0, 1) (float32 on a grid of 2^-24), v [B L] in [0, 1)
        (float64 on a grid of 2^-32) where the process replaces.
        """

    def prior(self, like: Array, v: Array | None = None) -> Array:
        """The canvas of pure noise, in the shape and type of `like`; v as in `corrupt`."""

    def x0_log_probs(self, logits: Array) -> Array:
        """Raw logits [... V] -> log p(x0) [... V]; ids that no clean text holds get -inf."""

    def marginal(self, x0_probs: Array, t: Array) -> Array:
        """q(xt | x0 ~ p) [... V] of p [... V], which gives nothing to ids that no clean text holds."""

    def posterior(self, x0_probs: Array, xt: Array, s: Array, t: Array) -> Array:
        """q(xs | xt, x0 ~ p) [... V] for s < t, of p [... V]: one step of the reverse process."""

    def nelbo_rate(self, law: Array | Law, x0: Array, xt: Array, t: Array) -> Array:
        """Nats [...] per unit of time, whose mean over xt, integrated over t, bounds -log p(x0); differentiable.

        law: log-probs [... V] as `x0_log_probs` gives them, or a `Law`; x0, xt [...] ids; t broadcasts to them.
        """


class AbsorbingNoise(Frozen):
    """Recipe section of masked diffusion."""

    type: Literal["absorbing"] = "absorbing"
    schedule: AnySchedule = LinearSchedule()
    replaces: ClassVar[bool] = AbsorbingProcess.replaces

    def bind(self, mask_id: int, vocab_size: int) -> AbsorbingProcess:
        """The process over a vocabulary of `vocab_size` ids whose mask is `mask_id`."""
        return AbsorbingProcess(mask_id=mask_id, schedule=self.schedule)


class UniformNoise(Frozen):
    """Recipe section of uniform-state diffusion."""

    type: Literal["uniform"] = "uniform"
    schedule: AnySchedule = LinearSchedule()
    replaces: ClassVar[bool] = UniformProcess.replaces

    def bind(self, mask_id: int, vocab_size: int) -> UniformProcess:
        """The process over a vocabulary of `vocab_size` ids whose mask is `mask_id`."""
        return UniformProcess(mask_id=mask_id, vocab_size=vocab_size, schedule=self.schedule)


class HybridNoise(Frozen):
    """Recipe section of masks mixed with random text; `p_u`: the share of random tokens where it is largest."""

    type: Literal["hybrid"] = "hybrid"
    schedule: AnySchedule = LinearSchedule()
    p_u: float = Field(0.1, ge=0, lt=1)
    gamma: float = Field(1.0, gt=0, le=2)
    replaces: ClassVar[bool] = HybridProcess.replaces

    def bind(self, mask_id: int, vocab_size: int) -> HybridProcess:
        """The process over a vocabulary of `vocab_size` ids whose mask is `mask_id`."""
        return HybridProcess(
            mask_id=mask_id, vocab_size=vocab_size, schedule=self.schedule, p_u=self.p_u, gamma=self.gamma
        )


def _absorbing_unless_said(section: Any) -> Any:
    """`noise.process.schedule.type=cosine` alone means masks."""
    return {"type": "absorbing", **section} if isinstance(section, dict) else section


AnyNoise = Annotated[
    AbsorbingNoise | UniformNoise | HybridNoise,
    Field(discriminator="type"),
    BeforeValidator(_absorbing_unless_said),
]


class NoiseConfig(Frozen):
    """Section `noise`. `epochs` are written down beforehand; later ones are computed, with the same bits."""

    process: AnyNoise = AbsorbingNoise()
    epochs: int = Field(2, ge=0, le=1 << 20)
    t_min: float = Field(1e-3, ge=0, lt=1, description="training times lie in (t_min, 1]")
    block_length: int | None = Field(None, ge=1, description="one t for each block of so many tokens; null: one a row")
    steps: int | None = Field(None, ge=1, le=1 << 20, description="T of a chain in discrete time; null: continuous")

    @model_validator(mode="before")
    @classmethod
    def _computed(cls, values: Any) -> Any:
        """`noise: computed` writes nothing down and gives the same batches."""
        return {"epochs": 0} if values == "computed" else values
