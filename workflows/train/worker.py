"""One rank of a training run: joins the group that Ray Train made and trains on from the newest checkpoint."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.manifest import read_manifest
from dllm_core.errors import CheckpointError, DataError
from dllm_core.storage.progress import progress_to
from dllm_core.storage.store import LocalStore
from dllm_core.training.deepspeed_backend import DeepSpeedBackend
from dllm_core.training.events import StepRecord
from dllm_core.training.watchdog import Watchdog
from workflows.train.announcements import Announcer, StopWatch
from workflows.train.facts import facts
from workflows.train.job import RUN_FACTS, WorkerJob
from workflows.train.session import MetricsLog, Silence, open_session, train_to_end
from workflows.train.trackers import open_trackers, scalars

_STALLS = "stalls"


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point on each rank."""
    job: WorkerJob = config["job"]
    recipe, announcer = job.recipe, Announcer(job.mailbox)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = _device(recipe.placement.train.gpus_per_worker)

    def report_damage(error: CheckpointError) -> None:
        if rank == 0:
            announcer.tell("checkpoint_refused", reason=str(error))

    with _watched(job, rank, announcer) as watchdog, contextlib.ExitStack() as stack:

        def listen(step: int) -> Silence:
            return stack.enter_context(_Listener(job, announcer, step)) if rank == 0 else Silence()

        manifest = read_manifest(job.run.store, job.corpus)
        if rank == 0:
            job.run.write_json(RUN_FACTS, facts(recipe, job.run, manifest, device, world_size))
        with progress_to(watchdog.beat):
            trainer = open_session(
                recipe,
                job.run,
                manifest,
                device,
                backend=DeepSpeedBackend,
                events_of=listen,
                on_damage=report_damage,
                should_stop=StopWatch(job.mailbox) if rank == 0 else lambda: False,
                beat=watchdog.beat,
            )
        position = train_to_end(trainer, job.run, manifest)
        if rank == 0 and not trainer.is_stopped:
            announcer.tell_surely("finished", step=position.step)


def _device(gpus: float) -> torch.device:
    """What this rank computes on. A GPU that is paid for and not seen is no reason to train on the CPU beside it."""
    if not gpus:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = f"this worker was given {gpus:g} of a node whose GPUs torch {torch.__version__} does not see"
        remedy = "install torch with CUDA, and the driver, on that node, or set it to 0"
        raise DataError("placement.train.gpus_per_worker", problem, remedy=remedy)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def _watched(job: WorkerJob, rank: int, announcer: Announcer) -> Iterator[Watchdog]:
    """A watchdog over this rank. Where the one before left stacks behind, they are kept and told of."""
    path = _stall_path(job.run, rank)
    if path.exists() and path.stat().st_size:
        name = f"{_STALLS}/rank-{rank}-{int(path.stat().st_mtime)}.txt"
        job.run.store.put(job.run.key(name), path.read_bytes())
        announcer.tell("stalled", rank=rank, stacks=f"{job.run.url}/{name}")
    watchdog = Watchdog(path, job.recipe.placement.train.stall_seconds)
    watchdog.beat()
    try:
        yield watchdog
    finally:
        watchdog.close()


def _stall_path(run: RunDir, rank: int) -> Path:
    """A file on this machine's disk, since a stack is written without any help of ours.

    A run of the same name in another bucket may train here too, and another user's folder is not ours to write into.
    """
    if isinstance(run.store, LocalStore):
        return run.store.path(run.key(f"{_STALLS}/rank-{rank}.txt"))
    folder = f"dllm-{_STALLS}-{CheckpointStore(run).identity}-{os.geteuid()}"
    return Path(tempfile.gettempdir(), folder, f"rank-{rank}.txt")


class _Listener(MetricsLog):
    """Rank 0: metrics.jsonl, trackers and the driver's screen."""

    def __init__(self, job: WorkerJob, announcer: Announcer, resumed_at: int) -> None:
        super().__init__(job.run, resumed_at)
        self._announcer, self._workers = announcer, job.recipe.placement.train.workers
        self._trackers = open_trackers(job.recipe, job.run, resumed_at, self._lost)

    def __enter__(self) -> "_Listener":
        return self

    def __exit__(self, *error: Any) -> None:
        if any(error):  # a run that ended badly shall not lose the lines that say how; a good end's last save sent them
            with contextlib.suppress(DataError):
                self._log.sync()
        for tracker in self._trackers:
            tracker.close()

    def _lost(self, name: str, reason: str) -> None:
        self._announcer.tell("tracker_lost", tracker=name, reason=reason)

    def started(self, step: int, seconds: float, micro_rows: int | None) -> None:
        """Tell where it goes on, how, and which process does: a test may want to kill it."""
        self._announcer.tell(
            "started",
            step=step,
            seconds=round(seconds, 1),
            workers=self._workers,
            micro_rows=micro_rows,
            pid=os.getpid(),
        )

    def stepped(self, record: StepRecord) -> None:
        """Write a line, draw a point, move the bar."""
        super().stepped(record)
        values = record.as_json()
        for tracker in self._trackers:
            tracker.log(record.step, dict(scalars(values)))
        self._announcer.tell("step", **values)

    def saved(self, step: int) -> None:
        """It is durable, and its lines are."""
        self._announcer.tell("checkpoint", step=step)

    def not_saved(self, step: int, reason: str) -> None:
        """The next one may succeed."""
        self._announcer.tell("checkpoint_failed", step=step, reason=reason)

    def skipped(self, step: int, counters: range) -> None:
        """The loss or its gradient was not a number."""
        self._announcer.tell("step_skipped", step=step, samples=[counters.start, counters.stop])
