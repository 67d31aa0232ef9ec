"""What the evaluate stage's driver holds, and what each of its tasks gets and opens."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.loader import documents_of, evenly, split_rows
from dllm_core.data.manifest import CorpusManifest, corpus_prefix, read_manifest
from dllm_core.errors import DataError
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.seeding import Ints
from workflows.fan_out import FanOut
from workflows.recipe import Recipe

OnProgress = Callable[[str, int, int], None]
Item = TypeVar("Item")
Result = TypeVar("Result")
Items = TypeVar("Items", Ints, list[Any])


def corpus_of(run: RunDir, bundle: ModelBundle) -> CorpusManifest:
    """The corpus that a bundle learned from. DataError where it was made anew with another tokenizer: its ids would
    still be ids of the model, and mean other text.
    """
    manifest = read_manifest(run.store, bundle.manifest.lineage.corpus)
    if manifest.tokenizer_sha256 != bundle.manifest.tokenizer_sha256:
        place = f"{run.store.url}/{corpus_prefix(manifest.fingerprint)}"
        problem = f"was made anew, with another tokenizer than that of {run.url}/bundle"
        raise DataError(place, problem, remedy="bring the corpus back that the run was trained on")
    return manifest


@dataclass(frozen=True)
class EvaluateJob:
    """What a task needs."""

    recipe: Recipe
    run: RunDir

    @property
    def device(self) -> str:
        """Where this task computes."""
        return "cuda" if self.recipe.placement.evaluate.gpus_per_worker and torch.cuda.is_available() else "cpu"

    def opened(self) -> tuple[ModelBundle, CorpusManifest]:
        """The bundle that is measured and the corpus that it learned from."""
        torch.set_num_threads(1)
        bundle = read_bundle(self.run)
        return bundle, corpus_of(self.run, bundle)

    def heldout(self, manifest: CorpusManifest, rows: Ints) -> HeldoutRows:
        """Held-out rows by their numbers."""
        return HeldoutRows.of(split_rows(self.run.store, manifest, manifest.heldout, rows), rows)


@dataclass(frozen=True)
class Evaluation:
    """A stage that runs. rows: the held-out rows that are scored, evenly spaced, at most `evaluate.rows`."""

    job: EvaluateJob
    bundle: ModelBundle
    manifest: CorpusManifest
    rows: Ints
    fan_out: FanOut
    on_progress: OnProgress

    @classmethod
    def of(cls, recipe: Recipe, run: RunDir, fan_out: FanOut, on_progress: OnProgress) -> "Evaluation":
        """Opens the bundle. Raises CheckpointError where there is none."""
        bundle = read_bundle(run)
        manifest = corpus_of(run, bundle)
        rows = evenly(np.arange(manifest.heldout.rows), recipe.evaluate.rows)
        return cls(EvaluateJob(recipe, run), bundle, manifest, rows, fan_out, on_progress)

    def each(self, what: str, function: Callable[[EvaluateJob, Item], Result], items: Sequence[Item]) -> list[Result]:
        """A function of the job and an item, as tasks; results in the order of items."""
        placement = self.job.recipe.placement.evaluate

        def tell(done: int, result: Result) -> None:
            self.on_progress(what, done, len(items))

        self.on_progress(what, 0, len(items))
        task = partial(function, self.job)
        return self.fan_out(task, items, workers=placement.workers, demand=placement.demand, on_done=tell)

    def documents(self, rows: Ints) -> Ints:
        """Which document each of these rising held-out rows is of."""
        manifest = self.manifest
        return documents_of(self.job.run.store, manifest, manifest.heldout, rows, self.bundle.config.eos_id)

    def batches(self, items: Items) -> list[Items]:
        """In order, `evaluate.batch_rows` a batch."""
        size = self.job.recipe.evaluate.batch_rows
        return [items[start : start + size] for start in range(0, len(items), size)]
