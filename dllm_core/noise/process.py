"""NoiseProcess: what every forward process promises, and the recipe section that names one.

A recipe does not know the mask id (the tokenizer does), so a section is *bound* to a vocabulary before use.
"""

from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from dllm_core.config.base import Frozen
from dllm_core.noise.absorbing import AbsorbingProcess
from dllm_core.noise.arrays import Array
from dllm_core.noise.schedule import AnySchedule, LinearSchedule


class NoiseProcess(Protocol):
    """q(xt | x0): a frozen value; uniforms come in as arrays."""

    def corrupt(self, x0: Array, t: Array, u: Array) -> Array:
        """Draw xt ~ q(. | x0). x0 [B L] ids, t [B L] or [B 1] in [0, 1], u [B L] in [0, 1)."""

    def prior(self, like: Array) -> Array:
        """The canvas at t = 1, in the shape of `like`."""

    def x0_log_probs(self, logits: Array) -> Array:
        """Raw logits [... V] at noised positions -> log p(x0 | xt); ids that no clean text holds get -inf."""

    def nelbo_rate(self, t: Array) -> Array:
        """Weight w(t) of the cross-entropy at noised positions in the continuous-time NELBO."""


class AbsorbingNoise(Frozen):
    """Recipe section of masked diffusion."""

    type: Literal["absorbing"] = "absorbing"
    schedule: AnySchedule = LinearSchedule()

    def bind(self, mask_id: int) -> AbsorbingProcess:
        """The process over a vocabulary whose mask is `mask_id`."""
        return AbsorbingProcess(mask_id=mask_id, schedule=self.schedule)


class NoiseConfig(Frozen):
    """Section `noise`. `epochs` are written down beforehand; later ones are computed, with the same bits."""

    process: AbsorbingNoise = AbsorbingNoise()
    epochs: int = Field(2, ge=0, le=1 << 20)
    t_min: float = Field(1e-3, ge=0, lt=1, description="training times lie in (t_min, 1]")
    block_length: int | None = Field(None, ge=1, description="one t for each block of so many tokens; null: one a row")

    @model_validator(mode="before")
    @classmethod
    def _computed(cls, values: Any) -> Any:
        """`noise: computed` writes nothing down and gives the same batches."""
        return {"epochs": 0} if values == "computed" else values
