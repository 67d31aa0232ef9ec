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
from dllm_core.evaluation.generation import DecodeCost, measure_decoding
from dllm_core.evaluation.likelihood import RowScores, score_rows, summarize
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
    """The figures of `evaluation.json`."""
    bundle = read_bundle(run)
    manifest = read_manifest(run.store, bundle.manifest.lineage.corpus)
    job = EvaluateJob(recipe, run)
    rows = job.rows(manifest)
    size = recipe.evaluate.batch_rows
    batches = [rows[start : start + size] for start in range(0, len(rows), size)]
    placement = recipe.placement.evaluate
    scored = fan_out(
        partial(_score, job),
        batches,
        workers=placement.workers,
        gpus=placement.gpus_per_worker,
        on_done=lambda done, result: on_progress("held-out rows", min(done * size, len(rows)), len(rows)),
    )
    scores = RowScores(
        np.concatenate([part.scores.nats for part in scored]),
        np.concatenate([part.scores.tokens for part in scored]),
    )
    likelihood = summarize(scores, np.sum([part.counts for part in scored], axis=0))
    result: dict[str, Any] = {
        **asdict(likelihood),
        "gain": likelihood.gain,
        "draws": recipe.evaluate.draws,
        "step": bundle.manifest.lineage.step,
    }
    if recipe.evaluate.prompts:
        on_progress("decoding held-out prompts", 0, 0)
        [cost] = fan_out(
            partial(_decode, job),
            [rows],
            workers=1,
            gpus=placement.gpus_per_worker,
        )
        policy = recipe.decode.policy.model_dump(mode="json")
        result["decoding"] = {
            **asdict(cost),
            "tokens_per_call": cost.tokens_per_call,
            "policy": policy,
            "block_length": recipe.decode.block_length,
            "temperature": recipe.decode.temperature,
        }
    return result


@dataclass(frozen=True)
class _Scored:
    scores: RowScores
    counts: Ints


def _opened(job: EvaluateJob) -> tuple[ModelBundle, CorpusManifest, str]:
    torch.set_num_threads(1)
    bundle = read_bundle(job.run)
    device = "cuda" if job.recipe.placement.evaluate.gpus_per_worker and torch.cuda.is_available() else "cpu"
    return bundle, read_manifest(job.run.store, bundle.manifest.lineage.corpus), device


def _score(job: EvaluateJob, rows: Ints) -> _Scored:
    bundle, manifest, device = _opened(job)
    read = split_rows(job.run.store, manifest, manifest.heldout, rows)
    scores = score_rows(
        bundle.denoiser(device),
        bundle.process,
        read.x0,
        read.is_learned,
        rows,
        seed=job.recipe.seed,
        draws=job.recipe.evaluate.draws,
        device=torch.device(device),
        segment_ids=read.segment_ids,
        not_noised=~read.is_learned if read.has_prompt else None,
    )
    return _Scored(scores, np.bincount(read.x0[read.is_learned], minlength=manifest.vocab_size))


def _decode(job: EvaluateJob, rows: Ints) -> DecodeCost:
    bundle, manifest, device = _opened(job)
    chosen = rows[np.linspace(0, len(rows) - 1, min(job.recipe.evaluate.prompts, len(rows))).astype(np.int64)]
    x0 = split_rows(job.run.store, manifest, manifest.heldout, chosen).x0
    engine = Engine.of(bundle, device, job.recipe.serve.max_batch_tokens)
    return measure_decoding(engine, x0, job.recipe.decode, context=manifest.seq_len, seed=job.recipe.seed)
