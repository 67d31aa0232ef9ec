"""A training session on one rank: the model, its newest checkpoint, objective, data and backend, put together.

Everything here may be killed at any moment; a session that starts anew resumes by itself.
"""

from collections.abc import Callable

import torch
from safetensors.torch import load_file

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.loader import Loader, Prefetcher
from dllm_core.data.manifest import read_manifest, read_tokenizer
from dllm_core.errors import CheckpointError
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import WEIGHTS_NAME, assign_weights
from dllm_core.objective.build import new_objective
from dllm_core.training.backend import Backend, resolve_precision
from dllm_core.training.events import StepRecord, TrainEvents
from dllm_core.training.loop import Trainer, measure_peak_flops
from workflows.recipe import Recipe
from workflows.train.job import denoiser_config

METRICS = "metrics.jsonl"


def open_session(
    recipe: Recipe,
    run: RunDir,
    corpus: str,
    device: torch.device,
    *,
    backend_of: Callable[[Denoiser], Backend],
    events_of: Callable[[int], TrainEvents],
    on_damage: Callable[[CheckpointError], None],
) -> Trainer:
    """A trainer that stands where the run's newest intact checkpoint does. events_of is given that step."""
    manifest = read_manifest(run.store, corpus)
    tokenizer = read_tokenizer(run.store, manifest)
    mask_id, config = tokenizer.mask_id, denoiser_config(recipe, manifest, tokenizer)
    torch.manual_seed(recipe.seed)
    with device:
        module = Denoiser(config)
    checkpoints = CheckpointStore(run)
    newest = checkpoints.newest(on_damage)
    if newest is not None:
        weights = load_file(newest.files[WEIGHTS_NAME], device=str(device))
        assign_weights(module, weights, newest.name)
    backend = backend_of(module)
    peak = measure_peak_flops(resolve_precision(recipe.train.precision, device), device)
    [peak] = backend.sum_over_ranks([peak])
    trainer = Trainer(
        recipe.train,
        backend,
        new_objective(
            recipe.objective,
            config,
            manifest.process.bind(mask_id, manifest.vocab_size),
            device,
            seed=recipe.seed,
            block_length=manifest.block_length,
            steps=manifest.steps,
            t_min=manifest.t_min,
        ),
        Prefetcher(Loader.open(run.store, manifest, mask_id)),
        checkpoints,
        events_of(newest.manifest.position.step if newest else 0),
        samples_per_epoch=manifest.train.rows,
        peak_flops=peak,
    )
    if newest is not None:
        trainer.resume(newest)
    return trainer


class Silence:
    """Events that nobody hears."""

    def started(self, step: int, seconds: float) -> None:
        """Nothing."""

    def stepped(self, record: StepRecord) -> None:
        """Nothing."""

    def saved(self, step: int) -> None:
        """Nothing."""

    def skipped(self, step: int) -> None:
        """Nothing."""
