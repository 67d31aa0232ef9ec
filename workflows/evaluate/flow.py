"""The evaluate stage: score the bundle that will be served, on rows that training never saw.

dllm evaluate RUN evaluate.draws=32
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.loader import split_rows
from dllm_core.data.manifest import CorpusManifest, read_manifest
from dllm_core.decoding.engine import Engine
from dllm_core.evaluation.estimators import Estimator, HeldoutRows, estimator_of
from dllm_core.evaluation.generation import DecodeCost, measure_decoding
from dllm_core.evaluation.likelihood import (
    Likelihood,
    RowScores,
    estimate,
    score_rows,
    side_by_side,
    summarize,
    without_likelihood,
)
from dllm_core.seeding import Ints
from workflows.fan_out import FanOut
from workflows.recipe import Recipe

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class EvaluateJob:
    """What a task needs."""

    recipe: Recipe
    run: RunDir

    def rows(self, manifest: CorpusManifest) -> Ints:
        """Held-out rows to score: evenly spaced, at most `evaluate.rows`."""
        wanted = min(self.recipe.evaluate.rows, manifest.heldout.rows)
        return np.linspace(0, manifest.heldout.rows - 1, wanted).astype(np.int64)


def evaluate(recipe: Recipe, run: RunDir, fan_out: FanOut, on_progress: OnProgress) -> dict[str, Any]:
    """The figures of `evaluation.json`: None where a model has no likelihood, or `decoding` no decoder."""
    bundle = read_bundle(run)
    manifest = read_manifest(run.store, bundle.manifest.lineage.corpus)
    job = EvaluateJob(recipe, run)
    rows = job.rows(manifest)
    likelihood, has_prompts = _likelihood(job, bundle, manifest, rows, fan_out, on_progress)
    return {
        **asdict(likelihood),
        "gain": likelihood.gain,
        "conventions": {
            "tokens": "learned" if has_prompts else "real",
            "end_tokens": "counted",
            "conditioned_on": "prompts" if has_prompts else "nothing",
        },
        "step": bundle.manifest.lineage.step,
        "decoding": _decoding(job, rows, fan_out, on_progress),
    }


def _likelihood(
    job: EvaluateJob,
    bundle: ModelBundle,
    manifest: CorpusManifest,
    rows: Ints,
    fan_out: FanOut,
    on_progress: OnProgress,
) -> tuple[Likelihood, bool]:
    """The figures, and whether rows have prompts, on which they are conditioned."""
    section, placement = job.recipe.evaluate, job.recipe.placement.evaluate
    batches = [rows[start : start + section.batch_rows] for start in range(0, len(rows), section.batch_rows)]
    tokens = split_rows(job.run.store, manifest, manifest.heldout, rows)
    counts = np.bincount(tokens.x0[tokens.is_learned], minlength=manifest.vocab_size)
    byte_lengths = bundle.tokenizer().byte_lengths()
    estimator = _estimator(bundle, "cpu")
    if estimator is None:
        return without_likelihood(len(rows), counts, byte_lengths), tokens.has_prompt

    def score(first: int, draws: int) -> RowScores:
        def tell(done: int, result: RowScores) -> None:
            on_progress(f"held-out rows, draws {first + 1} to {first + draws}", done, len(batches))

        task = partial(_score, job, first, draws)
        return side_by_side(
            fan_out(task, batches, workers=placement.workers, gpus=placement.gpus_per_worker, on_done=tell)
        )

    scores = estimate(score, section.draws, section.target_error)
    return summarize(scores, counts, byte_lengths, estimator.name), tokens.has_prompt


def _decoding(job: EvaluateJob, rows: Ints, fan_out: FanOut, on_progress: OnProgress) -> dict[str, Any] | None:
    """What completions cost; None where there is no decoder for such a model, or nothing is to be decoded."""
    recipe = job.recipe
    if not recipe.can_be_decoded or not recipe.evaluate.prompts:
        return None
    on_progress("decoding held-out prompts", 0, 0)
    [cost] = fan_out(partial(_decode, job), [rows], workers=1, gpus=recipe.placement.evaluate.gpus_per_worker)
    return {
        **asdict(cost),
        "tokens_per_call": cost.tokens_per_call,
        **recipe.decode_told,
        "temperature": recipe.decode.temperature,
    }


def _opened(job: EvaluateJob) -> tuple[ModelBundle, CorpusManifest, str]:
    torch.set_num_threads(1)
    bundle = read_bundle(job.run)
    device = "cuda" if job.recipe.placement.evaluate.gpus_per_worker and torch.cuda.is_available() else "cpu"
    return bundle, read_manifest(job.run.store, bundle.manifest.lineage.corpus), device


def _estimator(bundle: ModelBundle, device: str) -> Estimator | None:
    """By what the bundle says of itself: the recipe may be another's."""
    said = bundle.manifest
    return estimator_of(
        said.objective,
        bundle.process,
        torch.device(device),
        block_length=said.block_length,
        steps=said.steps,
        time_conditioning=bundle.config.model.time_conditioning,
    )


def _score(job: EvaluateJob, first: int, draws: int, rows: Ints) -> RowScores:
    bundle, manifest, device = _opened(job)
    estimator = _estimator(bundle, device)
    assert estimator is not None
    heldout = HeldoutRows.of(split_rows(job.run.store, manifest, manifest.heldout, rows), rows)
    return score_rows(bundle.denoiser(device), estimator, heldout, seed=job.recipe.seed, draws=draws, first=first)


def _decode(job: EvaluateJob, rows: Ints) -> DecodeCost:
    bundle, manifest, device = _opened(job)
    chosen = rows[np.linspace(0, len(rows) - 1, min(job.recipe.evaluate.prompts, len(rows))).astype(np.int64)]
    x0 = split_rows(job.run.store, manifest, manifest.heldout, chosen).x0
    engine = Engine.of(bundle, device, job.recipe.serve.max_batch_tokens)
    return measure_decoding(engine, x0, job.recipe.decode, context=manifest.seq_len, seed=job.recipe.seed)
