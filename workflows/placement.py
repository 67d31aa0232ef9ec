"""Section `placement`: where work runs and how much of it at once. It may change speed and rounding, nothing else.

`labels` and `resources` say which nodes of a cluster a stage is for: labels of the node (Ray's label selectors), and
custom resources that a node type offers, of which each task, worker or replica takes so much. Ray's launcher starts
nodes by resources; labels keep work off nodes that would do and are not meant; memory keeps more off a node than it can
hold. A private cluster is one machine that does everything, so there none of them is asked for.
"""

from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from dllm_core.config.base import FieldProblem, Frozen

CPUS_OF_GATEWAY = 0.1
MEMORY, GIB = "memory", 1 << 30
_OWN_FIELDS = ("CPU", "GPU", MEMORY, "object_store_memory")


class Demand(Frozen):
    """What one task, worker or replica takes of a node, and which nodes it may be on."""

    cpus: float = 1
    gpus: float = 0
    memory_gib: float = 0
    resources: dict[str, float] = Field({})
    labels: dict[str, str] = Field({})

    @property
    def amounts(self) -> dict[str, float]:
        """By Ray's names, memory in bytes; what is not asked for is left out."""
        named = {"CPU": self.cpus, "GPU": self.gpus, MEMORY: int(self.memory_gib * GIB), **self.resources}
        return {name: amount for name, amount in named.items() if amount}


class NodeChoice(Frozen):
    """Which nodes of a cluster a stage is for."""

    labels: dict[str, str] = Field({}, description="labels that its nodes have, e.g. {dllm-stage: train}")
    resources: dict[str, float] = Field({}, description="custom resources, of which each task takes so much")
    memory_gib: float = Field(0, ge=0, description="of a node's memory that each task takes; 0: Ray does not count it")

    @field_validator("resources")
    @classmethod
    def _are_custom(cls, resources: dict[str, float]) -> dict[str, float]:
        for name, amount in resources.items():
            if name in _OWN_FIELDS or not amount > 0:
                problem = "has a field of its own" if name in _OWN_FIELDS else "must be above 0"
                raise ValueError(f"{name}={amount:g} {problem}")
        return resources

    @field_validator("gpus_per_worker", "gpus_per_replica", check_fields=False)
    @classmethod
    def _are_whole_or_a_part_of_one(cls, gpus: float) -> float:
        if gpus > 1 and gpus % 1:
            raise ValueError("must be whole above 1: Ray gives a part of one GPU alone")
        return gpus

    def _demand(self, cpus: float, gpus: float) -> Demand:
        rest = {"memory_gib": self.memory_gib, "resources": self.resources, "labels": self.labels}
        return Demand(cpus=cpus, gpus=gpus, **rest)


class PreprocessPlacement(NodeChoice):
    """`workers` tasks at once, one core each."""

    workers: int = Field(2, ge=1, le=1 << 16)

    @property
    def demand(self) -> Demand:
        """Of a task."""
        return self._demand(1, 0)


class TrainPlacement(NodeChoice):
    """One worker process a device. A worker that dies is restarted from the newest checkpoint `max_failures` times."""

    workers: int = Field(2, ge=1, le=1 << 16)
    cpus_per_worker: float = Field(1, gt=0)
    gpus_per_worker: float = Field(0, ge=0)
    max_failures: int = Field(3, ge=0)
    stall_seconds: float = Field(
        1800, gt=0, description="a worker that makes no step, saves and loads nothing for so long is ended"
    )

    @property
    def demand(self) -> Demand:
        """Of a worker."""
        return self._demand(self.cpus_per_worker, self.gpus_per_worker)


class EvaluatePlacement(NodeChoice):
    """`workers` tasks at once, one core each."""

    workers: int = Field(2, ge=1, le=1 << 16)
    gpus_per_worker: float = Field(0, ge=0)

    @property
    def demand(self) -> Demand:
        """Of a task."""
        return self._demand(1, self.gpus_per_worker)


class ServePlacement(NodeChoice):
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

    @property
    def demand(self) -> Demand:
        """Of a decode replica."""
        return self._demand(self.cpus_per_replica, self.gpus_per_replica)

    @property
    def gateway_demand(self) -> Demand:
        """Of a gateway, which needs none of the custom resources."""
        return Demand(cpus=CPUS_OF_GATEWAY, labels=self.labels)

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
