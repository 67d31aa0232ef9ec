"""The evaluate stage: measure the bundle that will be served, on rows that training never saw.

dllm evaluate RUN evaluate.draws=32 evaluate.infill.rows=256
"""

import json
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.loader import evenly, split_rows
from dllm_core.decoding.engine import Engine
from dllm_core.errors import DataError
from dllm_core.evaluation.estimators import estimator_of_bundle
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
from dllm_core.evaluation.samples import openings
from dllm_core.seeding import Ints
from workflows.evaluate.job import EvaluateJob, Evaluation, OnProgress
from workflows.evaluate.measures import measure_all
from workflows.fan_out import FanOut
from workflows.recipe import Recipe


def evaluate(recipe: Recipe, run: RunDir, fan_out: FanOut, on_progress: OnProgress) -> dict[str, Any]:
    """The figures of `evaluation.json`: None where a model has no likelihood, or `decoding` no decoder."""
    stage = Evaluation.of(recipe, run, fan_out, on_progress)
    likelihood, has_prompts = _likelihood(stage)
    figures = {
        **asdict(likelihood),
        "gain": likelihood.gain,
        "conventions": {
            "tokens": "learned" if has_prompts else "real",
            "end_tokens": "counted",
            "conditioned_on": "prompts" if has_prompts else "nothing",
        },
        "step": stage.bundle.manifest.lineage.step,
        "decoding": _decoding(stage),
        **measure_all(stage),
    }
    plain: dict[str, Any] = json.loads(json.dumps(figures))  # as it is read again: lists, no tuples
    return plain


def _likelihood(stage: Evaluation) -> tuple[Likelihood, bool]:
    """The figures, and whether rows have prompts, on which they are conditioned."""
    section, manifest, run = stage.job.recipe.evaluate, stage.manifest, stage.job.run
    tokens = split_rows(run.store, manifest, manifest.heldout, stage.rows)
    counts = np.bincount(tokens.x0[tokens.is_learned], minlength=manifest.vocab_size)
    if not counts.any():
        raise DataError(run.url, "no token of the held-out rows counts", remedy="raise corpus.heldout_fraction")
    byte_lengths = stage.bundle.tokenizer().byte_lengths()
    estimator = estimator_of_bundle(stage.bundle, "cpu")
    if estimator is None:
        return without_likelihood(len(stage.rows), counts, byte_lengths), tokens.has_prompt

    def score(first: int, draws: int) -> RowScores:
        what = f"held-out rows, draws {first + 1} to {first + draws}"
        return side_by_side(stage.each(what, partial(_score, first=first, draws=draws), stage.batches(stage.rows)))

    scores = estimate(score, section.draws, section.target_error)
    documents = stage.documents(stage.rows)
    return summarize(scores, counts, byte_lengths, estimator.name, documents), tokens.has_prompt


def _decoding(stage: Evaluation) -> dict[str, Any] | None:
    """What completions cost; None where there is no decoder for such a model, or nothing is to be decoded."""
    recipe = stage.job.recipe
    if not recipe.can_be_decoded or not recipe.evaluate.prompts:
        return None
    [cost] = stage.each("decoding held-out prompts", _decode, [evenly(stage.rows, recipe.evaluate.prompts)])
    if not cost.prompts:
        return None
    return {
        **asdict(cost),
        "tokens_per_call": cost.tokens_per_call,
        **recipe.decode_told,
        "temperature": recipe.decode.temperature,
    }


def _score(job: EvaluateJob, rows: Ints, *, first: int, draws: int) -> RowScores:
    bundle, manifest = job.opened()
    estimator = estimator_of_bundle(bundle, job.device)
    assert estimator is not None
    heldout = job.heldout(manifest, rows)
    return score_rows(bundle.denoiser(job.device), estimator, heldout, seed=job.recipe.seed, draws=draws, first=first)


def _decode(job: EvaluateJob, rows: Ints) -> DecodeCost:
    bundle, manifest = job.opened()
    context, eos_id = manifest.seq_len, bundle.config.eos_id
    prompts, _ = openings(job.heldout(manifest, rows), 1, context=context, end_id=eos_id)
    engine = Engine(bundle, job.device, job.recipe.serve.max_batch_tokens)
    return measure_decoding(engine, prompts, job.recipe.decode, context=context, seed=job.recipe.seed)
