"""What is measured beside the likelihood: calibration, infilling, generated text, tasks with known answers.

Each gives plain data for `evaluation.json`; null where it was not asked for, `{"not_measured": why}` where the model
cannot do it.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial, reduce
from typing import Any

import numpy as np

from dllm_core.checkpoints.bundle import ModelBundle, read_bundle
from dllm_core.checkpoints.run_dir import RunDir
from dllm_core.data.loader import evenly
from dllm_core.data.manifest import CorpusManifest
from dllm_core.data.packing import PaddedPacking
from dllm_core.decoding.config import DecodeConfig
from dllm_core.errors import ConfigError
from dllm_core.evaluation.calibration import CalibrationScores, summarize_calibration
from dllm_core.evaluation.config import NGramScorerConfig
from dllm_core.evaluation.infill import HoleScores, score_infill, sides_seen, summarize_holes, token_gain
from dllm_core.evaluation.models import (
    filler_of,
    score_confidence,
    why_no_confidence,
    why_not_written,
    writer_of,
)
from dllm_core.evaluation.samples import Samples, TextQuality, measure_samples, openings
from dllm_core.evaluation.scorers import AutoregressiveScorer, NGramModel, Scorer
from dllm_core.evaluation.tasks.measure import Answered, answer_problems, rooms_for, summarize_answers
from dllm_core.evaluation.tasks.problem import Problem
from dllm_core.evaluation.tasks.section import AnyTask
from dllm_core.evaluation.writers import Tokens
from dllm_core.seeding import Ints
from workflows.evaluate.job import EvaluateJob, Evaluation

Figures = dict[str, Any]
_EXAMPLES = 4


class _NotMeasuredError(Exception):
    """Why not, in one line."""


def measure_all(stage: Evaluation) -> dict[str, Any]:
    """Every measure by its name in `evaluation.json`."""
    section = stage.job.recipe.evaluate
    return {
        "calibration": _tried(_calibration, stage) if section.calibration.rows else None,
        "infill": _tried(_infill, stage) if section.infill.rows else None,
        "samples": _tried(_samples, stage) if section.samples.rows else None,
        "tasks": [
            {"task": task.model_dump(mode="json"), **_tried(_task, stage, number)}
            for number, task in enumerate(section.tasks)
        ],
    }


def _tried(measure: Callable[..., Figures], stage: Evaluation, *more: Any) -> Figures:
    try:
        return measure(stage, *more)
    except _NotMeasuredError as why:
        return {"not_measured": str(why)}


def _unless(problem: ConfigError | None) -> None:
    if problem is not None:
        raise _NotMeasuredError(f"{problem.place}={problem.value}: {problem.problem}")


def _calibration(stage: Evaluation) -> Figures:
    _unless(why_no_confidence(stage.bundle))
    rows = evenly(stage.rows, stage.job.recipe.evaluate.calibration.rows)
    found = stage.each("confidence at masks", _score_confidence, stage.batches(rows))
    documents = stage.documents(rows)
    joined = [reduce(CalibrationScores.joined, parts) for parts in zip(*found, strict=True)]
    measured = [summarize_calibration(scores, documents) for scores in joined]
    if not any(measured):
        raise _NotMeasuredError("no token was hidden: more rows, or higher rates")
    return {"rows": len(rows), "by_rate": [asdict(one) for one in measured if one is not None]}


def _score_confidence(job: EvaluateJob, rows: Ints) -> list[CalibrationScores]:
    bundle, manifest = job.opened()
    denoiser, heldout = bundle.denoiser(job.device), job.heldout(manifest, rows)
    seed, rates = job.recipe.seed, job.recipe.evaluate.calibration.rates
    return [score_confidence(bundle, denoiser, heldout, rate, seed=seed, device=job.device) for rate in rates]


def _infill(stage: Evaluation) -> Figures:
    recipe, section, said = stage.job.recipe, stage.job.recipe.evaluate.infill, stage.bundle.manifest
    _unless(why_not_written(stage.bundle))
    rows, seen = evenly(stage.rows, section.rows), sides_seen(said.objective, said.process)
    found = stage.each("filling holes", _fill, stage.batches(rows))
    joined = [reduce(HoleScores.joined, parts) for parts in zip(*found, strict=True)]
    scores = {(one.length, one.side): one for one in joined if len(one.hits)}
    left_out = [
        {
            "length": length,
            "side": side,
            "why": "no row has room" if side in seen else f"it sees {', '.join(seen)} only",
        }
        for length in section.lengths
        for side in section.sides
        if (length, side) not in scores
    ]
    if not scores:
        raise _NotMeasuredError("; ".join(sorted({str(one["why"]) for one in left_out})))
    pairs = [(scores[one.length, "both"], one) for one in scores.values() if (one.length, "both") in scores]
    document = dict(zip(rows.tolist(), stage.documents(rows).tolist(), strict=True))

    def units(of: HoleScores) -> Ints:
        return np.array([document[row] for row in of.row_ids.tolist()])

    return {
        "rows": len(rows),
        "decode": _settings(stage, recipe.decode.model_copy(update={"temperature": 0.0})),
        "holes": [
            asdict(one) for found in scores.values() if (one := summarize_holes(found, units(found))) is not None
        ],
        "gains": [
            {"length": one.length, "over": one.side, "token": asdict(token_gain(both, one, units(one)))}
            for both, one in pairs
            if one.side != "both"
        ],
        "left_out": left_out,
    }


def _fill(job: EvaluateJob, rows: Ints) -> list[HoleScores]:
    bundle, manifest = job.opened()
    recipe, tokenizer = job.recipe, bundle.tokenizer()
    section, seed = recipe.evaluate.infill, recipe.seed
    decode = recipe.decode.model_copy(update={"temperature": 0.0})
    filler = filler_of(bundle, decode, job.device, seed=seed, max_batch_tokens=recipe.serve.max_batch_tokens)
    return score_infill(
        filler,
        job.heldout(manifest, rows),
        lengths=section.lengths,
        sides=section.sides,
        seed=seed,
        never=tokenizer.special_ids,
    )


def _samples(stage: Evaluation) -> Figures:
    recipe, section = stage.job.recipe, stage.job.recipe.evaluate.samples
    decode = recipe.decode.model_copy(update={"temperature": section.temperature})
    _unless(why_not_written(stage.bundle))
    rows, context = evenly(stage.rows, section.rows), stage.manifest.seq_len
    size = min(decode.max_tokens, context - context // 4)
    heldout = stage.job.heldout(stage.manifest, rows)
    prompts, texts = openings(heldout, size, context=context, end_id=stage.bundle.config.eos_id)
    if not prompts:
        raise _NotMeasuredError(f"no prompt of the held-out rows leaves {size} of the context's {context} tokens")
    write = partial(_write, decode=decode.model_copy(update={"max_tokens": size}))
    parts = stage.each("writing samples", write, stage.batches(list(enumerate(prompts))))
    answers = [tokens for part in parts for tokens in part]
    judge = [(Samples.of(prompts, answers), Samples.of(prompts, texts))]
    [(scorer, model, text)] = stage.each("judging samples", _judge, judge)
    return {
        "scorer": scorer,
        "decode": {**_settings(stage, decode), "max_tokens": size},
        "model": _quality(model),
        "heldout": _quality(text),
    }


def _write(job: EvaluateJob, prompts: Sequence[tuple[int, Tokens]], *, decode: DecodeConfig) -> list[list[int]]:
    """Answers to numbered prompts: each is written with its own number, in whatever batch."""
    bundle, _ = job.opened()
    writer = writer_of(bundle, decode, job.device, max_batch_tokens=job.recipe.serve.max_batch_tokens)
    written = writer.write([prompt for _, prompt in prompts], decode.max_tokens, seed=job.recipe.seed + prompts[0][0])
    return [answer.tokens for answer in written]


def _judge(job: EvaluateJob, samples: tuple[Samples, Samples]) -> tuple[str, TextQuality | None, TextQuality | None]:
    """The scorer's name, and what it thinks of the model's answers and of the text itself."""
    bundle, manifest = job.opened()
    scorer = _scorer(job, bundle, manifest)
    model, text = (measure_samples(part, scorer) for part in samples)
    return scorer.name, model, text


def _scorer(job: EvaluateJob, bundle: ModelBundle, manifest: CorpusManifest) -> Scorer:
    section = job.recipe.evaluate.samples.scorer
    if not isinstance(section, NGramScorerConfig):
        digest, context = bundle.tokenizer().digest, manifest.seq_len
        return AutoregressiveScorer.of(read_bundle(RunDir.at(section.run)), digest, context, job.device)
    never = {bundle.config.mask_id}
    return NGramModel.of_corpus(job.run.store, manifest, rows=section.rows, order=section.order, never=never)


def _quality(quality: TextQuality | None) -> Figures:
    if quality is None:
        return {"not_measured": "every text is empty"}
    figures = asdict(quality)
    del figures["scorer"]
    return {**figures, "perplexity": asdict(quality.perplexity)}


def _task(stage: Evaluation, number: int) -> Figures:
    recipe, section, context = stage.job.recipe, stage.job.recipe.evaluate, stage.manifest.seq_len
    task, tokenizer = section.tasks[number], stage.bundle.tokenizer()
    _unless(why_not_written(stage.bundle))
    try:
        problems = task.problems("test", section.problems, seed=recipe.seed)
    except ConfigError as error:
        raise _NotMeasuredError(f"{error.problem}, and evaluate.problems={section.problems}") from error
    needed = max(len(tokenizer.encode(p.prompt)) for p in problems) + rooms_for(tokenizer, problems)[0]
    if needed > context:
        raise _NotMeasuredError(f"a problem takes {needed} tokens, the context holds {context}")
    packing = stage.manifest.packing
    is_filled = isinstance(packing, PaddedPacking) and packing.learn_padding
    rooms = rooms_for(tokenizer, problems, context if is_filled else None)
    asked = list(zip(itertools.count(), problems, rooms, strict=False))
    parts = stage.each(f"answering {task.type}", partial(_answer, task=task), stage.batches(asked))
    answered = [one for part in parts for one in part]
    result = summarize_answers(answered)
    assert result is not None
    examples = [
        {"prompt": problem.prompt, "answer": one.text, "is_correct": one.grade.is_correct}
        for problem, one in zip(problems[:_EXAMPLES], answered, strict=False)
    ]
    return {"decode": _settings(stage, recipe.decode), **asdict(result), "examples": examples}


def _answer(job: EvaluateJob, asked: Sequence[tuple[int, Problem, int]], *, task: AnyTask) -> list[Answered]:
    """Numbered problems, each answered with its own number and room, in whatever batch."""
    bundle, _ = job.opened()
    writer = writer_of(bundle, job.recipe.decode, job.device, max_batch_tokens=job.recipe.serve.max_batch_tokens)
    numbers, problems, rooms = zip(*asked, strict=True)
    return answer_problems(writer, bundle.tokenizer(), task, problems, rooms=rooms, seed=job.recipe.seed + numbers[0])


def _settings(stage: Evaluation, decode: DecodeConfig) -> Figures:
    """How text came about."""
    return {**stage.job.recipe.decode_told, "temperature": decode.temperature, "top_p": decode.top_p}
