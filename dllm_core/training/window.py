"""Window: sums over the steps since the last record, and the record that they make."""

import math
from dataclasses import dataclass

from dllm_core.checkpoints.store import TrainPosition
from dllm_core.objective.loss import LEVELS
from dllm_core.training.config import TrainConfig
from dllm_core.training.events import Preferred, Score, StepRecord


@dataclass(frozen=True)
class StepSums:
    """Of one step over all ranks. levels: the bound's nats at each level of t, then the tokens there. preferred: of its
    `divisor` pairs, how many prefer the chosen answer, and the sum of their margins.
    """

    grad_norm: float
    nats: float
    divisor: float
    bound: float
    tokens: float
    learning_rate: float
    levels: list[float]
    preferred: list[float] | None = None


class Window:
    """`open` at a position, `add` steps, `record`. mfu_per_rate: utilisation at one token a second.

    data_wait, save_wait: seconds, added to by the loop. heldout: the newest score, kept over windows.
    """

    def __init__(self, config: TrainConfig, *, samples_per_epoch: int, mfu_per_rate: float) -> None:
        self._config, self._samples_per_epoch, self._mfu_per_rate = config, samples_per_epoch, mfu_per_rate
        self.heldout: Score | None = None
        self.open(TrainPosition())

    def open(self, position: TrainPosition) -> None:
        """Begin anew."""
        self._begun, self._steps = position, list[StepSums]()
        self.data_wait = self.save_wait = 0.0

    def add(self, sums: StepSums) -> None:
        """A step that was taken."""
        self._steps.append(sums)

    @property
    def num_steps(self) -> int:
        """Steps taken, without those that were skipped."""
        return len(self._steps)

    def record(self, position: TrainPosition) -> StepRecord:
        """Means over the window, which ends at `position`. Raises ZeroDivisionError for one without a step."""
        span = max(position.seconds - self._begun.seconds, 1e-9)
        nats, divisor, bound, tokens, grad_norm = (
            sum(getattr(one, name) for one in self._steps)
            for name in ("nats", "divisor", "bound", "tokens", "grad_norm")
        )
        rate = tokens / span
        return StepRecord(
            step=position.step,
            loss=nats / max(divisor, 1.0),
            bound=bound / max(tokens, 1.0) if math.isfinite(bound) else None,
            grad_norm=grad_norm / self.num_steps,
            learning_rate=self._steps[-1].learning_rate,
            tokens=position.tokens_seen,
            tokens_per_s=rate,
            mfu=rate * self._mfu_per_rate,
            seconds=position.seconds,
            epoch=position.samples_seen / self._samples_per_epoch,
            data_wait=min(1.0, self.data_wait / span),
            save_wait=min(1.0, self.save_wait / span),
            eta_s=self._seconds_left(position, span),
            heldout=self.heldout,
            by_level=self._by_level(),
            preference=self._preference(divisor),
        )

    def _seconds_left(self, position: TrainPosition, span: float) -> float:
        """Until the budget ends, of steps or of time, whichever is first."""
        by_steps = (self._config.steps - position.step) * span / (position.step - self._begun.step)
        by_time = math.inf if self._config.seconds is None else self._config.seconds - position.seconds
        return max(0.0, min(by_steps, by_time))

    def _preference(self, pairs: float) -> Preferred | None:
        told = [one.preferred for one in self._steps if one.preferred is not None]
        if not told:
            return None
        wins, margin = (sum(column) for column in zip(*told, strict=True))
        return Preferred(wins / max(pairs, 1.0), margin / max(pairs, 1.0))

    def _by_level(self) -> tuple[float | None, ...] | None:
        sums = [sum(column) for column in zip(*(one.levels for one in self._steps), strict=True)]
        nats, tokens = sums[:LEVELS], sums[LEVELS:]
        if not any(tokens):
            return None
        return tuple(n / count if count else None for n, count in zip(nats, tokens, strict=True))
