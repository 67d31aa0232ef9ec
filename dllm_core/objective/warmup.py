"""Block-length warm-up: the first steps are diffusion in other blocks than the rest. LLaDA2.0, section on WSD.

An autoregressive model sees blocks of one token; from there blocks grow, and whole rows come last:

    block_warmup: [{block_length: 1, steps: 100}, {block_length: 4, steps: 100}, {block_length: 32, steps: 100}]

Noise and objective of a step follow from its sample counters alone, so a resume at any step, any world size and any
micro-batches take the same ones. The loop knows nothing of it: `StagedBatches` is a loader, `Staged` an objective.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from dllm_core.data.batch import Batch
from dllm_core.data.loader import Batches, Loader
from dllm_core.model.pattern import AttentionPattern
from dllm_core.objective.config import DiffusionOptions
from dllm_core.objective.loss import DenoiserLike, LossSum, Objective


class StagedBatches:
    """Batches from one loader after another. ends: the step at which each but the last is over."""

    def __init__(self, loaders: Sequence[Batches], ends: Sequence[int]) -> None:
        self._loaders, self._ends = loaders, np.asarray(ends)

    @classmethod
    def of(cls, config: DiffusionOptions, loader: Loader, seq_len: int) -> "StagedBatches":
        """A corpus's rows; noise of the warm-up is computed for its own blocks, whatever is written."""
        stages = [loader.in_blocks(block_of(stage.block_length, seq_len)) for stage in config.block_warmup]
        return cls([*stages, loader], ends_of(config))

    def batch(self, counter: int, rows: int, rank: int = 0, world_size: int = 1) -> Batch:
        """As the stage's loader gives it. `rows` are those of a step, of which `counter` is a multiple."""
        number = np.searchsorted(self._ends, counter // rows, side="right")
        return self._loaders[int(number)].batch(counter, rows, rank, world_size)


class Staged:
    """One objective after another. batch_rows: of a step, over all workers; ends: as of StagedBatches.

    What a step costs and whom a position sees is told of the last, which is what is trained for.
    """

    def __init__(self, objectives: Sequence[Objective], ends: Sequence[int], batch_rows: int) -> None:
        self.stages, self._ends, self._batch_rows = objectives, np.asarray(ends), batch_rows
        self.pattern, self.passes = objectives[-1].pattern, objectives[-1].passes

    def loss(self, denoiser: DenoiserLike, batch: Batch) -> LossSum:
        """Of the batch's stage."""
        return self._of(batch).loss(denoiser, batch)

    def divisor(self, batch: Batch) -> float:
        """Of the batch's stage."""
        return self._of(batch).divisor(batch)

    def _of(self, batch: Batch) -> Objective:
        step = int(batch.counters[0]) // self._batch_rows if len(batch.counters) else 0
        return self.stages[int(np.searchsorted(self._ends, step, side="right"))]


def widest_pattern(objective: Objective) -> AttentionPattern:
    """Of its stages' patterns the one whose forwards hold the most: [xt ; x0] is twice as long as a row."""
    stages = objective.stages if isinstance(objective, Staged) else [objective]
    return next((stage.pattern for stage in stages if stage.pattern.has_clean_half), objective.pattern)


def ends_of(config: DiffusionOptions) -> list[int]:
    """The step at which each stage of the warm-up is over."""
    return list(accumulate(stage.steps for stage in config.block_warmup))


def block_of(block_length: int, seq_len: int) -> int | None:
    """What a stage's blocks are to noise and objective: None where one holds a whole row, which has no clean half."""
    return None if block_length >= seq_len else block_length
