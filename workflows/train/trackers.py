"""Trackers: TensorBoard, Weights & Biases, MLflow. They get what metrics.jsonl gets, and cannot harm a run.

Each runs in a thread of its own behind a queue: one that fails is left out from then on, one that hangs is not waited
for, and one whose library is missing is never there. What that costs is told once.
"""

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.storage.store import LocalStore
from workflows.recipe import Recipe

_LONGEST_QUEUE = 10_000
_CLOSE_WITHIN_S = 5.0
OnFailure = Callable[[str, str], None]


class Tracker(Protocol):
    """A library that draws curves."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Scalars of a step."""

    def close(self) -> None:
        """Write what is buffered."""


class TensorBoard:
    """Event files in the run's folder, which must be on a disk."""

    def __init__(self, run: RunDir, resumed_at: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        assert isinstance(run.store, LocalStore)
        self._writer = SummaryWriter(str(run.store.path(run.key("tensorboard"))), purge_step=resumed_at + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run for each run of ours: a restart goes on in it."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        import wandb

        self._run = wandb.init(
            project=recipe.tracking.project,
            id=run.name,
            name=run.name,
            resume="allow",
            config=recipe.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A row."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Upload the rest."""
        self._run.finish()


class MLflow:
    """One MLflow run a start, at MLFLOW_TRACKING_URI, tagged with our run's name."""

    def __init__(self, recipe: Recipe, run: RunDir) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.set_experiment(recipe.tracking.project)
        mlflow.start_run(run_name=run.name, tags={"dllm.run": run.name})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """A batch."""
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self._mlflow.end_run()


class Guarded:
    """A tracker in a thread. open: makes it, there; its failures end it and are told once."""

    def __init__(self, name: str, open_tracker: Callable[[], Tracker], on_failure: OnFailure) -> None:
        self._name, self._on_failure = name, on_failure
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(_LONGEST_QUEUE)
        self._thread = threading.Thread(target=self._run, args=(open_tracker,), name=f"tracker-{name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over, or drop it where the tracker is 10,000 records behind or gone."""
        if self._thread.is_alive() and not self._queue.full():
            self._queue.put_nowait((step, values))

    def close(self) -> None:
        """Give it some seconds to write the rest."""
        if self._thread.is_alive() and not self._queue.full():
            self._queue.put_nowait(None)
        self._thread.join(_CLOSE_WITHIN_S)

    def _run(self, open_tracker: Callable[[], Tracker]) -> None:
        try:
            tracker = open_tracker()
            while (item := self._queue.get()) is not None:
                tracker.log(*item)
            tracker.close()
        except BaseException as error:  # noqa: BLE001 (a library may even exit; nothing of it ends a run)
            self._on_failure(self._name, f"{type(error).__name__}: {error}")


def open_trackers(recipe: Recipe, run: RunDir, resumed_at: int, on_failure: OnFailure) -> list[Guarded]:
    """TensorBoard where the run is on a disk, and what `tracking` asks for."""
    wanted: dict[str, Callable[[], Tracker]] = {}
    if isinstance(run.store, LocalStore):
        wanted["tensorboard"] = lambda: TensorBoard(run, resumed_at)
    if recipe.tracking.wandb:
        wanted["wandb"] = lambda: WeightsAndBiases(recipe, run)
    if recipe.tracking.mlflow:
        wanted["mlflow"] = lambda: MLflow(recipe, run)
    return [Guarded(name, open_tracker, on_failure) for name, open_tracker in wanted.items()]


def scalars(values: Mapping[str, Any], prefix: str = "train") -> Iterator[tuple[str, float]]:
    """The numbers of a record by their paths, e.g. `train/heldout/nats`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}/{name}")
        elif isinstance(value, list):
            yield from scalars({str(at): part for at, part in enumerate(value)}, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name != "step":
            yield f"{prefix}/{name}", float(value)
