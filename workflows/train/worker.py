"""One rank of a training run: joins the group that Ray Train made and trains on from the newest checkpoint."""

import os
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from dllm_core.checkpoints.run_dir import JsonLines
from dllm_core.errors import CheckpointError
from dllm_core.storage.store import LocalStore
from dllm_core.training.deepspeed_backend import DeepSpeedBackend
from dllm_core.training.events import StepRecord
from workflows.train.announcements import Announcer
from workflows.train.job import WorkerJob
from workflows.train.session import METRICS, Silence, open_session


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point on each rank."""
    job: WorkerJob = config["job"]
    recipe, announcer = job.recipe, Announcer(job.mailbox)
    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and recipe.placement.train.gpus_per_worker:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)

    def report_damage(error: CheckpointError) -> None:
        if rank == 0:
            announcer.tell("checkpoint_refused", reason=str(error))

    open_session(
        recipe,
        job.run,
        job.corpus,
        device,
        backend_of=lambda module: DeepSpeedBackend(module, recipe.train),
        events_of=lambda step: _Listener(job, announcer, step) if rank == 0 else Silence(),
        on_damage=report_damage,
    ).run()


class _Listener:
    """Rank 0: metrics.jsonl, TensorBoard and the driver's screen."""

    def __init__(self, job: WorkerJob, announcer: Announcer, resumed_at: int) -> None:
        self._announcer = announcer
        self._metrics = JsonLines(job.run, METRICS)
        self._metrics.keep(lambda record: record["step"] <= resumed_at)  # steps after it are taken again
        self._board: SummaryWriter | None = None
        if isinstance(job.run.store, LocalStore):
            folder = job.run.store.path(job.run.key("tensorboard"))
            self._board = SummaryWriter(str(folder), purge_step=resumed_at + 1)

    def started(self, step: int, seconds: float) -> None:
        """Tell where it goes on, and which process does: a test may want to kill it."""
        self._announcer.tell("started", step=step, seconds=round(seconds, 1), pid=os.getpid())

    def stepped(self, record: StepRecord) -> None:
        """Write a line, draw a point, move the bar."""
        values = record.as_json()
        self._metrics.append(values)
        if self._board is not None:
            for name, value in values.items():
                if name != "step":
                    self._board.add_scalar(f"train/{name}", value, record.step)
        self._announcer.tell("step", **values)

    def saved(self, step: int) -> None:
        """Logs are durable whenever a checkpoint is."""
        self._metrics.sync()
        if self._board is not None:
            self._board.flush()
        self._announcer.tell("checkpoint", step=step)

    def skipped(self, step: int) -> None:
        """The loss was not a number."""
        self._announcer.tell("step_skipped", step=step)
