"""A training session on one rank: the model, its newest checkpoint, objective, data and backend, put together.

Everything here may be killed at any moment; a session that starts anew resumes by itself.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from dllm_core.checkpoints.bundle import ModelBundle
from dllm_core.checkpoints.run_dir import JsonLines, RunDir
from dllm_core.checkpoints.store import Checkpoint, CheckpointStore, TrainPosition
from dllm_core.data.loader import Batches, Loader, Prefetcher, documents_of, evenly, split_rows
from dllm_core.data.manifest import CorpusManifest, read_tokenizer
from dllm_core.data.order import SampleOrder
from dllm_core.errors import CheckpointError, DataError, DivergedError
from dllm_core.evaluation.estimators import Draw, Estimator, HeldoutRows, estimator_of
from dllm_core.model.config import LAYOUT_NAME, WEIGHTS_NAME
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.tensor_file import TensorFile
from dllm_core.objective.build import new_objective
from dllm_core.objective.config import DiffusionOptions, PreferenceConfig
from dllm_core.objective.loss import DenoiserLike
from dllm_core.objective.warmup import StagedBatches, widest_pattern
from dllm_core.seeding import Doubles
from dllm_core.training.backend import Backend, BackendKind, resolve_precision
from dllm_core.training.events import StepRecord, TrainEvents
from dllm_core.training.heldout import HeldoutScorer
from dllm_core.training.loop import Trainer, measure_peak_flops
from dllm_core.training.lora import adapt, assign_adapters
from dllm_core.training.mask_noise import MaskNoise
from dllm_core.training.micro_batch import chosen_micro_rows
from dllm_core.training.plan import held_at_once
from dllm_core.training.reading import is_alike, read_together
from dllm_core.training.started import StartedWeights, open_start
from workflows.malloc import keep_freed_memory
from workflows.recipe import Recipe
from workflows.train.job import check_rows, denoiser_config, needed_start

METRICS, DIVERGED = "metrics.jsonl", "diverged.json"
_BATCH_ROWS = 32


def open_session(
    recipe: Recipe,
    run: RunDir,
    manifest: CorpusManifest,
    device: torch.device,
    *,
    backend: BackendKind,
    events_of: Callable[[int], TrainEvents],
    on_damage: Callable[[CheckpointError], None],
    should_stop: Callable[[], bool] = lambda: False,
    beat: Callable[[], None] = lambda: None,
) -> Trainer:
    """A trainer that stands where the run's newest intact checkpoint does. events_of is given that step.

    should_stop, beat: as `Trainer` takes them; `beat` also while the checkpoint is read.
    """
    tokenizer = read_tokenizer(run.store, manifest)
    mask_id, config = tokenizer.mask_id, denoiser_config(recipe, manifest, tokenizer)
    keep_freed_memory()
    torch.manual_seed(recipe.seed)
    module = backend.new_denoiser(config, recipe.train, device)
    scored = manifest.heldout_digest(recipe.train.heldout_rows)
    checkpoints = CheckpointStore(run, manifest.rows_digest, scored)
    passed_over = list[CheckpointError]()

    def pass_over(error: CheckpointError) -> None:
        passed_over.append(error)
        on_damage(error)

    def read() -> tuple[Checkpoint | None, ModelBundle | None]:
        newest = checkpoints.newest(pass_over)
        if newest is not None:
            check_rows(newest.manifest, manifest, recipe.train.accept_corpus)
        start = needed_start(recipe, is_resumed=newest is not None)
        return newest, None if start is None else open_start(start)

    summed = partial(backend.summed, device=device)
    newest, bundle = read_together(read, summed, beat)
    if not is_alike(-1 if newest is None else newest.manifest.position.step, summed):
        raise _unalike(run, newest, passed_over)
    _load(recipe, backend, module, newest, bundle)
    reference = None
    if isinstance(recipe.objective, PreferenceConfig):
        assert recipe.start is not None
        assert bundle is not None
        untrained = backend.new_denoiser(config, recipe.train, device)
        backend.assign(untrained, StartedWeights(bundle, config), recipe.start.run)
        reference = backend.frozen(untrained, recipe.train)
    process = manifest.process.bind(mask_id, manifest.vocab_size)
    noise = {"block_length": manifest.block_length, "steps": manifest.steps}
    batch_rows = recipe.train.batch_rows
    objective = new_objective(
        recipe.objective,
        config,
        process,
        device,
        seed=recipe.seed,
        t_min=manifest.t_min,
        batch_rows=batch_rows,
        reference=reference,
        **noise,
    )
    widest = widest_pattern(objective)
    if recipe.start is not None and recipe.start.mask_noise is not None:
        objective = MaskNoise(objective, module, recipe.start.mask_noise, seed=recipe.seed, batch_rows=batch_rows)
    has_time = config.model.time_conditioning
    estimator = estimator_of(recipe.model_kind, process, device, time_conditioning=has_time, **noise)
    loader = _batches(recipe, run, manifest, mask_id)
    alone = partial(backend.alone, module, device)
    held = held_at_once(recipe.objective)
    micro_rows = chosen_micro_rows(recipe.train, config, alone, objective, loader, widest=widest, held=held)
    trained = backend(module, recipe.train)
    if trained.rank == 0 and bundle is not None and newest is None and LAYOUT_NAME in bundle.manifest.files:
        run.store.put_file(run.key(LAYOUT_NAME), bundle.folder / LAYOUT_NAME)
    peak = measure_peak_flops(resolve_precision(recipe.train.precision, device), device)
    [peak, rows] = trained.sum_over_ranks([peak, (micro_rows or 0) if trained.rank == 0 else 0])  # rank 0 decides
    trainer = Trainer(
        recipe.train.model_copy(update={"micro_rows": int(rows) or None}),
        trained,
        objective,
        Prefetcher(loader),
        checkpoints,
        events_of(newest.manifest.position.step if newest else 0),
        samples_per_epoch=manifest.train.rows,
        peak_flops=peak,
        heldout=heldout_scorer(recipe, run, manifest, estimator, trained, beat),
        should_stop=should_stop,
        beat=beat,
    )
    if newest is not None:
        trainer.resume(newest)
    return trainer


def _unalike(run: RunDir, newest: Checkpoint | None, passed_over: list[CheckpointError]) -> DataError:
    """Why ranks that stand at different steps cannot train: each would take batches, moments and endings of its own.

    Who passed something over says what; else a folder that is shared shows this machine less, or more, than another.
    """
    if passed_over:
        return passed_over[-1]
    found = "none" if newest is None else newest.name
    problem = f"the newest checkpoint is {found} as one machine sees it, and not as another does"
    return DataError(run.url, problem, remedy="run it again; if it stays so, the machines see different folders")


def _load(
    recipe: Recipe, backend: BackendKind, module: Denoiser, newest: Checkpoint | None, bundle: ModelBundle | None
) -> None:
    """Give the module the weights of the checkpoint, else of the start. Adapters are a checkpoint's alone."""
    lora = None if recipe.start is None else recipe.start.lora
    if recipe.start is not None and bundle is not None and (newest is None or lora is not None):
        backend.assign(module, StartedWeights(bundle, module.config), recipe.start.run)
    if lora is not None:
        torch.manual_seed(recipe.seed)  # every rank draws the same adapters
        adapt(module, lora)
    if newest is not None:
        assign = backend.assign if lora is None else assign_adapters
        assign(module, TensorFile(newest.files[WEIGHTS_NAME]), newest.name)


def _batches(recipe: Recipe, run: RunDir, manifest: CorpusManifest, mask_id: int) -> Batches:
    """The corpus's batches; in a warm-up, with its blocks' noise."""
    loader = Loader.open(run.store, manifest, mask_id)
    if isinstance(recipe.objective, DiffusionOptions) and recipe.objective.block_warmup:
        return StagedBatches.of(recipe.objective, loader, manifest.seq_len)
    return loader


def train_to_end(trainer: Trainer, run: RunDir, manifest: CorpusManifest) -> TrainPosition:
    """`trainer.run()`; where it diverges, the samples of the steps that were no numbers are written down first."""
    try:
        return trainer.run()
    except DivergedError as error:
        order, steps = SampleOrder(manifest.seed, manifest.train.rows), []
        for counters in trainer.skipped:
            epochs, ids = order.samples(np.arange(counters.start, counters.stop))
            steps.append({"counters": [counters.start, counters.stop], "epochs": epochs.tolist(), "rows": ids.tolist()})
        run.write_json(DIVERGED, {"corpus": manifest.fingerprint, "steps": steps})
        problem = f"{error.problem}; their rows are in {run.url}/{DIVERGED}"
        raise DivergedError(error.place, problem, remedy=error.remedy) from error


def heldout_scorer(
    recipe: Recipe,
    run: RunDir,
    manifest: CorpusManifest,
    estimator: Estimator | None,
    backend: Backend,
    beat: Callable[[], None] = lambda: None,
) -> HeldoutScorer | None:
    """A rank's share of `train.heldout_rows`, evenly spaced, each scored by one draw. None without a likelihood.

    Rows and draws are the same each time and for any number of ranks, so that two scores differ by the weights alone.
    Rows of one document are one unit, as in an evaluation. beat: called after each forward.
    """
    if estimator is None or recipe.train.heldout_every is None:
        return None
    store, split, ranks = run.store, manifest.heldout, backend.world_size
    ids = evenly(np.arange(split.rows), recipe.train.heldout_rows)
    units = documents_of(store, manifest, split, ids, backend.module.config.eos_id)
    num_forwards = math.ceil(math.ceil(len(ids) / ranks) / _BATCH_ROWS)
    parts = []
    for mine in np.array_split(np.arange(len(ids))[backend.rank :: ranks], num_forwards):
        shown = ids[mine] if len(mine) else ids[:1]  # who has none left goes along with the others' forwards
        parts.append((units[mine], HeldoutRows.of(split_rows(store, manifest, split, shown), shown)))
    draw = Draw(recipe.seed, 0)

    def score(denoiser: DenoiserLike) -> tuple[Doubles, Doubles]:
        nats, tokens = np.zeros((2, int(units[-1]) + 1))
        for at, rows in parts:
            np.add.at(nats, at, estimator.nats(denoiser, rows, draw)[: len(at)])
            np.add.at(tokens, at, rows.counted.sum(1)[: len(at)])
            beat()
        return nats, tokens

    return score


class Silence:
    """Events that nobody hears."""

    def started(self, step: int, seconds: float, micro_rows: int | None) -> None:
        """Nothing."""

    def stepped(self, record: StepRecord) -> None:
        """Nothing."""

    def saving(self, step: int) -> None:
        """Nothing."""

    def saved(self, step: int) -> None:
        """Nothing."""

    def not_saved(self, step: int, reason: str) -> None:
        """Nothing."""

    def skipped(self, step: int, counters: range) -> None:
        """Nothing."""


class MetricsLog(Silence):
    """Keeps `metrics.jsonl`, as every training does; after a restart, without the steps that are taken again."""

    def __init__(self, run: RunDir, resumed_at: int) -> None:
        self._log = JsonLines(run, METRICS)
        self._log.keep(lambda record: record["step"] <= resumed_at)

    def stepped(self, record: StepRecord) -> None:
        """A line."""
        self._log.append(record.as_json())

    def saving(self, step: int) -> None:
        """Its lines are durable before a checkpoint: who goes on from it elsewhere writes none of them again."""
        self._log.sync()
