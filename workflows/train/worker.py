"""One rank of a training run: joins the group that Ray Train made, finds the newest checkpoint, trains on.

Everything here may be killed at any moment; a worker that starts anew resumes by itself.
"""

import os
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

from dllm_core.checkpoints.run_dir import JsonLines
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.loader import Loader, Prefetcher
from dllm_core.data.manifest import read_manifest, read_tokenizer
from dllm_core.errors import CheckpointError
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import WEIGHTS_NAME, assign_weights
from dllm_core.objective.build import new_objective
from dllm_core.storage.store import LocalStore
from dllm_core.training.backend import resolve_precision
from dllm_core.training.deepspeed_backend import DeepSpeedBackend
from dllm_core.training.events import StepRecord
from dllm_core.training.loop import Trainer, measure_peak_flops
from workflows.train.announcements import Announcer
from workflows.train.job import WorkerJob, denoiser_config

METRICS = "metrics.jsonl"


def train_worker(config: dict[str, Any]) -> None:
    """Ray Train's entry point on each rank."""
    job: WorkerJob = config["job"]
    recipe, announcer = job.recipe, Announcer(job.mailbox)
    rank = int(os.environ["RANK"])
    device = torch.device("cpu")
    if torch.cuda.is_available() and recipe.placement.train.gpus_per_worker:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    manifest = read_manifest(job.run.store, job.corpus)
    tokenizer = read_tokenizer(job.run.store, manifest)
    mask_id, config_of_model = tokenizer.mask_id, denoiser_config(recipe, manifest, tokenizer)
    torch.manual_seed(recipe.seed)
    with device:
        module = Denoiser(config_of_model)

    def report_damage(error: CheckpointError) -> None:
        if rank == 0:
            announcer.tell("checkpoint_refused", reason=str(error))

    checkpoints = CheckpointStore(job.run)
    newest = checkpoints.newest(report_damage)
    if newest is not None:
        weights = load_file(newest.files[WEIGHTS_NAME], device=str(device))
        assign_weights(module, weights, newest.name)
    backend = DeepSpeedBackend(module, recipe.train)
    peak = measure_peak_flops(resolve_precision(recipe.train.precision, device), device)
    [peak] = backend.sum_over_ranks([peak])
    trainer = Trainer(
        recipe.train,
        backend,
        new_objective(
            recipe.objective,
            config_of_model,
            manifest.process.bind(mask_id, manifest.vocab_size),
            device,
            seed=recipe.seed,
            block_length=manifest.block_length,
            steps=manifest.steps,
            t_min=manifest.t_min,
        ),
        Prefetcher(Loader.open(job.run.store, manifest, mask_id)),
        checkpoints,
        _Listener(job, announcer, newest.manifest.position.step if newest else 0) if rank == 0 else _Silence(),
        samples_per_epoch=manifest.train.rows,
        peak_flops=peak,
    )
    if newest is not None:
        trainer.resume(newest)
    trainer.run()


class _Silence:
    """Ranks other than 0 have nothing to tell."""

    def started(self, step: int, seconds: float) -> None: ...

    def stepped(self, record: StepRecord) -> None: ...

    def saved(self, step: int) -> None: ...

    def skipped(self, step: int) -> None: ...


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
