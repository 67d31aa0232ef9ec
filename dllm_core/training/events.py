"""TrainEvents: what the loop announces. It never calls up; a listener reports to whoever runs it."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`: means over the steps since the last one.

    loss: what is minimised. bound: the negative log-likelihood or its bound, nats a token; None where the objective
    has none. grad_norm: before clipping. tokens_per_s and mfu: over all workers. tokens: seen so far.
    """

    step: int
    loss: float
    bound: float | None
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_s: float
    mfu: float
    seconds: float
    epoch: float

    def as_json(self) -> dict[str, Any]:
        """Plain data, short floats."""
        return {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in asdict(self).items()}


class TrainEvents(Protocol):
    """A listener. Called on rank 0 only; an exception in it ends the run, so it must not raise for a tracker."""

    def started(self, step: int, seconds: float) -> None:
        """Training begins, or goes on, at `step` after `seconds` of earlier training."""

    def stepped(self, record: StepRecord) -> None:
        """`log_every` steps are done."""

    def saved(self, step: int) -> None:
        """A checkpoint is committed."""

    def skipped(self, step: int) -> None:
        """A step was skipped on all ranks: its loss was not a number."""
