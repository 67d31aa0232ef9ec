"""A trainer over a small corpus for tests, with what can go wrong in it."""

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import SmallCorpus
from safetensors.torch import load_file

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.checkpoints.store import Checkpoint, CheckpointStore
from dllm_core.data.batch import Batch
from dllm_core.data.loader import Loader
from dllm_core.errors import CheckpointError
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import assign_weights
from dllm_core.objective.config import DiffusionConfig
from dllm_core.objective.diffusion import Diffusion
from dllm_core.objective.loss import DenoiserLike, LossSum, Objective
from dllm_core.storage.store import LocalStore
from dllm_core.training.backend import LocalBackend
from dllm_core.training.config import TrainConfig
from dllm_core.training.events import StepRecord
from dllm_core.training.loop import Trainer


class Told:
    """Keeps what the loop announces."""

    def __init__(self) -> None:
        self.begun: list[tuple[int, float]] = []
        self.records: list[StepRecord] = []
        self.saves: list[int] = []
        self.failed_saves: list[tuple[int, str]] = []
        self.skips: list[int] = []
        self.skipped_counters: list[range] = []

    def started(self, step: int, seconds: float, micro_rows: int | None) -> None:
        self.begun.append((step, seconds))

    def stepped(self, record: StepRecord) -> None:
        self.records.append(record)

    def saving(self, step: int) -> None:
        pass

    def saved(self, step: int) -> None:
        self.saves.append(step)

    def not_saved(self, step: int, reason: str) -> None:
        self.failed_saves.append((step, reason))

    def skipped(self, step: int, counters: range) -> None:
        self.skips.append(step)
        self.skipped_counters.append(counters)


class BadAt:
    """An objective whose loss is no number at some of its calls (counted from 0)."""

    def __init__(self, objective: Objective, calls: Callable[[int], bool], value: float = math.nan) -> None:
        self._objective, self._is_bad, self._value, self.calls = objective, calls, value, 0
        self.pattern, self.passes, self.divisor = objective.pattern, objective.passes, objective.divisor

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        loss = self._objective.loss(denoiser, batch)
        self.calls += 1
        return replace(loss, nats=loss.nats * self._value) if self._is_bad(self.calls - 1) else loss


class BadGradientAt(BadAt):
    """The loss stays as it is; its gradient is no number."""

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        loss = self._objective.loss(denoiser, batch)
        self.calls += 1
        return replace(loss, nats=loss.nats + 0 * torch.sqrt(0 * loss.nats)) if self._is_bad(self.calls - 1) else loss


class BadLossAt(BadAt):
    """The gradient stays as it is; the loss is no number."""

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        loss = self._objective.loss(denoiser, batch)
        self.calls += 1
        return replace(loss, nats=loss.nats + self._value) if self._is_bad(self.calls - 1) else loss


class Work:
    """A clock that work alone moves on: a loss takes a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def on(self, objective: Objective) -> Objective:
        """The objective, taking its time."""
        clock = self

        class Slow:
            pattern, passes, divisor = objective.pattern, objective.passes, staticmethod(objective.divisor)

            def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
                clock.now += 1
                return objective.loss(denoiser, batch)

        return Slow()


class Pair:
    """Two ranks in one process, each in a thread: what they sum, and how often each has shown that it lives."""

    def __init__(self) -> None:
        self._both, self._told, self.beats = threading.Barrier(2, timeout=60), [[0.0], [0.0]], [0, 0]

    def beat(self, rank: int) -> None:
        self.beats[rank] += 1

    def summed(self, rank: int, values: list[float]) -> list[float]:
        self._told[rank] = values
        self._both.wait()
        summed = [sum(both) for both in zip(*self._told, strict=True)]
        self._both.wait()
        return summed

    def backend(self, rank: int) -> type[LocalBackend]:
        pair = self

        class Ranked(LocalBackend):
            world_size = 2

            def sum_over_ranks(self, values: list[float]) -> list[float]:
                return pair.summed(self.rank, values)

        Ranked.rank = rank
        return Ranked


def run_dir(root, name: str) -> RunDir:
    return RunDir(LocalStore(root), name)


def make_trainer(
    corpus: SmallCorpus,
    checkpoints: CheckpointStore,
    *,
    wrap: Callable[[Objective], Objective] = lambda objective: objective,
    clock: Callable[[], float] = lambda: 0.0,
    peak_flops: float = math.inf,
    objective: DiffusionConfig = DiffusionConfig(),  # noqa: B008 (frozen)
    options: dict[str, Any] | None = None,
    kind: Callable[[Denoiser, TrainConfig], LocalBackend] = LocalBackend,
    on_damage: Callable[[CheckpointError], None] = lambda error: pytest.fail(str(error)),
    **fields: object,
) -> tuple[Trainer, LocalBackend, Told]:
    manifest, tokenizer = corpus.manifest, corpus.tokenizer
    config = TrainConfig.checked({**corpus.recipe.train.model_dump(), **fields})
    torch.manual_seed(3)
    module = Denoiser(
        DenoiserConfig(
            model=corpus.recipe.model,
            vocab_size=manifest.vocab_size,
            context_length=manifest.seq_len,
            mask_id=tokenizer.mask_id,
            eos_id=tokenizer.eos_id,
            pad_id=tokenizer.pad_id,
        )
    )
    newest = checkpoints.newest(on_damage)
    if newest is not None:
        assign_weights(module, load_file(newest.files["model.safetensors"]), newest.name)
    backend, told = kind(module, config), Told()
    process = manifest.process.bind(tokenizer.mask_id, manifest.vocab_size)
    trainer = Trainer(
        config,
        backend,
        wrap(Diffusion(objective, process, torch.device("cpu"))),
        Loader.open(corpus.store, manifest, tokenizer.mask_id),
        checkpoints,
        told,
        samples_per_epoch=manifest.train.rows,
        peak_flops=peak_flops,
        clock=clock,
        **(options or {}),
    )
    if newest is not None:
        trainer.resume(newest)
    return trainer, backend, told


def newest_of(root, name: str = "run") -> Checkpoint:
    newest = CheckpointStore(run_dir(root, name)).newest(lambda error: pytest.fail(str(error)))
    assert newest is not None
    return newest
