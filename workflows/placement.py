"""Section `placement`: where work runs and how much of it at once. It may change speed and rounding, nothing else."""

from typing import Any, Self

from pydantic import Field, model_validator

from dllm_core.config.base import FieldProblem, Frozen


class PreprocessPlacement(Frozen):
    """`workers` tasks at once, one core each."""

    workers: int = Field(2, ge=1, le=1 << 16)


class TrainPlacement(Frozen):
    """One worker process a device. A worker that dies is restarted from the newest checkpoint `max_failures` times."""

    workers: int = Field(2, ge=1, le=1 << 16)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    max_failures: int = Field(3, ge=0)
    stall_seconds: float = Field(
        1800, gt=0, description="a worker that makes no step for so long is ended, with stacks"
    )


class EvaluatePlacement(Frozen):
    """`workers` tasks at once."""

    workers: int = Field(2, ge=1, le=1 << 16)
    gpus_per_worker: float = Field(0, ge=0)


class ServePlacement(Frozen):
    """Gateways, and decode replicas, whose number is held between the two bounds by the work in hand.

    min_replicas 0: none while nobody asks; the first request then waits for one to start.
    """

    gateways: int = Field(1, ge=1, description="processes that read requests and write answers")
    min_replicas: int = Field(1, ge=0)
    max_replicas: int = Field(2, ge=1)
    target_work: float = Field(512, gt=0, description="denoiser calls, summed over rows, that a replica has in hand")
    up_after_s: float = Field(2, ge=0, description="work that asks for more replicas for so long gets them")
    down_after_s: float = Field(60, ge=0, description="work that fits into one fewer for so long ends one")
    cpus_per_replica: float = Field(0.5, gt=0)
    gpus_per_replica: float = Field(0, ge=0)

    @model_validator(mode="before")
    @classmethod
    def _of_older_runs(cls, values: Any) -> Any:
        """Their recorded recipes hold what replicas were scaled by before; it says nothing any more."""
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if name != "target_ongoing_requests"}
        return values

    @model_validator(mode="after")
    def _bounds_are_ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise FieldProblem("max_replicas", f"must be >= min_replicas={self.min_replicas}", self.max_replicas)
        return self


class PlacementConfig(Frozen):
    """Never part of a fingerprint."""

    preprocess: PreprocessPlacement = PreprocessPlacement()
    train: TrainPlacement = TrainPlacement()
    evaluate: EvaluatePlacement = EvaluatePlacement()
    serve: ServePlacement = ServePlacement()
