"""Section `train`. Torch-free, so that a recipe is checked in no time."""

import math
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dllm_core.config.base import FieldProblem, Frozen

CHECKPOINT_BYTES = 16  # a trained parameter: weights, average and two moments, fp32
OFFLOAD_NEEDS = {"none": 0, "optimizer": 1, "parameters": 3}
"""The lowest ZeRO stage of each `offload`."""


class TrainConfig(Frozen):
    """A run ends at `steps` or after `seconds` of training, whichever comes first; the learning rate follows both."""

    steps: int = Field(2000, ge=1, le=1 << 40)
    seconds: float | None = Field(None, gt=0, description="time budget over all restarts")
    batch_rows: int = Field(16, ge=1, description="rows of the global batch, over all workers")
    micro_rows: int | Literal["auto"] | None = Field(
        None, description="rows of one forward on one worker; auto: measured; null: all that the worker has"
    )
    zero_stage: int = Field(
        2, ge=0, le=3, description="1: optimizer cut over workers, 2: gradients too, 3: weights too"
    )
    offload: Literal["none", "optimizer", "parameters"] = Field(
        "none", description="what waits in CPU memory; parameters: weights and optimizer"
    )
    activation_checkpointing: bool = Field(False, description="compute blocks again in the backward, keep their inputs")
    compile: bool = Field(False, description="torch.compile each block")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 where the machine is fast in it")
    learning_rate: float = Field(3e-3, gt=0)
    schedule: Literal["linear", "cosine", "wsd"] = Field("linear", description="how the learning rate falls")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="wsd: the last share of training, in which it falls")
    final_lr_fraction: float = Field(0.05, ge=0, le=1)
    warmup_steps: int = Field(50, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(1.0, gt=0)
    ema_decay: float = Field(0.999, ge=0, lt=1)
    log_every: int = Field(20, ge=1)
    checkpoint_every: int = Field(200, ge=1, description="steps")
    keep_checkpoints: int = Field(2, ge=1, description="the newest ones")
    keep_every: int | None = Field(None, ge=1, description="steps at whose multiples a checkpoint stays for good")
    average_checkpoints: int = Field(1, ge=1, description="checkpoints whose averaged weights the bundle averages")
    average_from: Literal["newest", "best"] = Field("newest", description="best: by held-out score; these are kept too")
    accept_corpus: str | None = Field(
        None, pattern="^rows-[0-9a-f]{12}$", description="other rows that a run may go on with"
    )
    heldout_every: int | None = Field(200, ge=1, description="steps between scores of held-out rows, null: none")
    heldout_rows: int = Field(64, ge=2)

    @model_validator(mode="after")
    def _betas_decay(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise FieldProblem("betas", "must lie in [0, 1)", list(self.betas))
        return self

    @field_validator("micro_rows", mode="before")
    @classmethod
    def _rows_or_auto(cls, value: Any) -> Any:
        if value is None or value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError("must be a number of rows, 1 or more, or auto, or null")

    @model_validator(mode="after")
    def _what_is_averaged_is_kept(self) -> Self:
        if self.average_from == "best":
            if self.heldout_every is None:
                raise FieldProblem("average_from", "needs held-out scores: train.heldout_every is null", "best")
        elif self.average_checkpoints > self.keep_checkpoints:
            problem = f"must be <= train.keep_checkpoints={self.keep_checkpoints}"
            raise FieldProblem("average_checkpoints", problem, self.average_checkpoints)
        return self

    @model_validator(mode="after")
    def _offload_has_a_stage(self) -> Self:
        needed = OFFLOAD_NEEDS[self.offload]
        if self.zero_stage < needed:
            problem = f"needs train.zero_stage >= {needed}, which is {self.zero_stage}"
            raise FieldProblem("offload", problem, self.offload, f"train.zero_stage={needed}")
        return self

    def learning_rate_at(self, step: int, progress: float) -> float:
        """Linear warm-up by steps, times what the schedule leaves at a progress in [0, 1]."""
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        decay = 1 - (1 - self.final_lr_fraction) * self._fallen(min(1.0, progress))
        return self.learning_rate * warm * decay

    def _fallen(self, progress: float) -> float:
        """How much of the way to `final_lr_fraction` lies behind, 0 to 1.

        cosine: SGDR, arXiv:1608.03983, eq. 5, without restarts. wsd: warm-up, stable, decay, MiniCPM,
        arXiv:2404.06395; its decay is linear here, as in arXiv:2405.18392.
        """
        if self.schedule == "cosine":
            return (1 - math.cos(math.pi * progress)) / 2
        if self.schedule == "wsd":
            return max(0.0, 1 - (1 - progress) / self.decay_fraction)
        return progress

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the steps, as plain data to be hashed.

        Runs have their names from it. So a field that came later is left out where it says what was so before, and
        `zero_stage`, which changes rounding alone, always stands there as it was by default.
        """
        unsaid = BOOKKEEPING | PLACED
        if self.schedule != "wsd":
            unsaid |= {"decay_fraction"}
        if self.schedule == "linear":
            unsaid |= {"schedule"}
        values = self.model_dump(mode="json", exclude=set(unsaid))
        return {**values, "zero_stage": type(self).model_fields["zero_stage"].default}


BOOKKEEPING = frozenset(
    (
        *("log_every", "checkpoint_every", "keep_checkpoints", "keep_every", "average_checkpoints", "average_from"),
        *("heldout_every", "heldout_rows", "accept_corpus"),
    )
)
"""Fields that change what is written down, not what is learned: they are no part of a run's identity."""

PLACED = frozenset(("micro_rows", "offload", "activation_checkpointing", "compile"))
"""Fields that change speed, memory and rounding, as the number of workers does: no part of it either."""
