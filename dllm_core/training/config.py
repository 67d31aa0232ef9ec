"""Section `train`. Torch-free, so that a recipe is checked in no time."""

from typing import Literal, Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen


class TrainConfig(Frozen):
    """A run ends at `steps` or after `seconds` of training, whichever comes first; the learning rate follows both."""

    steps: int = Field(2000, ge=1, le=1 << 40)
    seconds: float | None = Field(None, gt=0, description="time budget over all restarts")
    batch_rows: int = Field(16, ge=1, description="rows of the global batch, over all workers")
    zero_stage: int = Field(2, ge=0, le=2)
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the machine has it")
    learning_rate: float = Field(3e-3, gt=0)
    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    warmup_steps: int = Field(50, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(200, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _betas_decay(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FieldProblem("betas", "must lie in [0, 1)", list(self.betas))
        return self

    def learning_rate_at(self, step: int, progress: float) -> float:
        """Linear warm-up by steps, then linear decay by progress in [0, 1] to `final_lr_fraction`."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay = 1 - (1 - self.final_lr_fraction) * min(1.0, progress)
        return self.learning_rate * warm * decay


BOOKKEEPING = frozenset(("log_every", "checkpoint_every", "keep_checkpoints"))
"""Fields that change what is written down, not what is learned: they are no part of a run's identity."""
