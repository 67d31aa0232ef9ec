"""TrainEvents: what the loop announces. It never calls up; a listener reports to whoever runs it."""

from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Score:
    """Of held-out rows, by the weights as they stood at `step` (not their average): nats a token.

    standard_error: rows are its unit, or all rows of one document together; None of one unit.
    """

    step: int
    nats: float
    standard_error: float | None


@dataclass(frozen=True)
class Preferred:
    """Of pairs: the share whose chosen answer has the higher reward, beta (log pi - log ref), and the mean margin."""

    accuracy: float
    margin: float


@dataclass(frozen=True)
class StepRecord:
    """One line of `metrics.jsonl`: means over the steps since the last one.

    loss: what is minimised. bound: the negative log-likelihood or its bound, nats a token; None where the objective
    has none. grad_norm: before clipping. tokens_per_s and mfu: over all workers. tokens: seen so far.
    data_wait, save_wait: shares of the time in which rank 0 waited for its batch and for a checkpoint. eta_s: seconds
    to the end of the budget at this speed. heldout: the newest `Score`, if there is one. by_level: the bound's rate at
    t in [0, 0.1), [0.1, 0.2), ..., whose mean is the bound where t is even; None where there is no t or was none there.
    preference: None but for pairs.
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
    data_wait: float
    save_wait: float
    eta_s: float
    heldout: Score | None = None
    by_level: tuple[float | None, ...] | None = None
    preference: Preferred | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain data, short floats."""
        return {name: _short(value) for name, value in asdict(self).items()}


def _short(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _short(part) for name, part in value.items()}
    return [_short(part) for part in value] if isinstance(value, list | tuple) else value


class TrainEvents(Protocol):
    """A listener. Called on rank 0 only; an exception in it ends the run, so it must not raise for a tracker."""

    def started(self, step: int, seconds: float, micro_rows: int | None) -> None:
        """Training begins, or goes on, at `step` after `seconds` of earlier training.

        micro_rows: rows of one forward on one worker, also where `auto` measured them; None: all that a worker has.
        """

    def stepped(self, record: StepRecord) -> None:
        """`log_every` steps are done."""

    def saving(self, step: int) -> None:
        """A checkpoint is about to be committed, or training ends: what was told before must be durable on return.

        Called by the thread that writes it, beside further calls. What it raises fails the save.
        """

    def saved(self, step: int) -> None:
        """A checkpoint is committed."""

    def not_saved(self, step: int, reason: str) -> None:
        """A checkpoint could not be written. The one before stands; training goes on, unless it was the last."""

    def skipped(self, step: int, counters: range) -> None:
        """A step was skipped on all ranks: its loss or gradient was not a number. counters: its samples."""
