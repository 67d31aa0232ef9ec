"""Continuations by every model: calls, speed, and what an outside judge thinks of them. One task for all of them.

Speeds compare because one process measures them one after the other, on the same prompts, in batches of the same size.
The judge is an n-gram model of the training text, which none of the models is.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.decoding.config import is_ancestral
from dllm_core.decoding.unmask import ThresholdPolicy
from dllm_core.errors import ConfigError
from dllm_core.evaluation.estimators import HeldoutRows
from dllm_core.evaluation.samples import Samples, measure_samples, openings
from dllm_core.evaluation.scorers import NGramModel
from dllm_core.evaluation.writers import Tokens, Writer, Written
from dllm_core.objective.config import AutoregressiveConfig
from workflows.compare.measures import Question, heldout_rows, speaker_of
from workflows.compare.recipe import GenerationConfig
from workflows.compare.report import AUTOREGRESSION
from workflows.compare.speakers import Speaker
from workflows.compare.training import device_of

_ORDER = 4
_MAX_JUDGED_ROWS = 20_000  # of training text; the judge takes some 40 bytes a token and order


def generate(question: Question) -> dict[str, Any]:
    """`text`: the held-out continuations themselves, cut and judged alike; `models`: a curve of each that can write."""
    device, section = device_of(question.gpus), question.recipe.generation
    first = question.entrants[0]
    manifest, config = first.manifest, read_bundle(first.run).config
    never, end_id = (config.mask_id, config.pad_id), config.eos_id
    judge = NGramModel.of_corpus(first.run.store, manifest, rows=_MAX_JUDGED_ROWS, order=_ORDER, never=never)
    ids, tokens = heldout_rows(first, section.prompts)
    rows, room = HeldoutRows.of(tokens, ids), min(section.tokens, manifest.seq_len - section.prompt_tokens)
    prompts, truth = openings(rows, room, context=manifest.seq_len, end_id=end_id, opening=section.prompt_tokens)
    if not prompts:
        problem = "no held-out document goes on behind so many tokens"
        raise ConfigError("generation.prompt_tokens", problem, section.prompt_tokens, "ask for fewer")
    told = measure_samples(Samples.of(prompts, truth), judge)
    models = {}
    with torch.inference_mode():
        for entrant in question.entrants:
            models[entrant.model] = _curve(question, speaker_of(entrant, device), prompts, room, judge)
    return {"judge": judge.name, "text": None if told is None else asdict(told), "models": models}


def _curve(
    question: Question, speaker: Speaker, prompts: Sequence[Tokens], room: int, judge: NGramModel
) -> list[dict[str, Any]] | None:
    """A point for each setting of what trades quality for speed; autoregression has none and is one point."""
    section = question.recipe.generation
    points = []
    for name, changed in _settings(section, speaker).items():
        writer = speaker.writer(speaker.served.model_copy(update={"temperature": section.temperature, **changed}))
        if writer is None:
            return None
        points.append({"setting": name, **_written(writer, prompts, room, judge)})
    return points


def _settings(section: GenerationConfig, speaker: Speaker) -> dict[str, dict[str, Any]]:
    """Overrides of `decode` by what a table calls them."""
    if isinstance(speaker.objective, AutoregressiveConfig):
        return {AUTOREGRESSION: {}}
    if is_ancestral(speaker.objective, speaker.bundle.manifest.process):
        return {f"{steps} steps": {"steps": steps} for steps in section.steps}
    return {f"threshold {value:g}": {"policy": ThresholdPolicy(threshold=value)} for value in section.thresholds}


def _written(writer: Writer, prompts: Sequence[Tokens], room: int, judge: NGramModel) -> dict[str, Any]:
    writer.write(prompts[:1], room, seed=0)  # what is made at the first call is not timed
    begun = time.perf_counter()
    answers: list[Written] = writer.write(prompts, room, seed=0)
    seconds = time.perf_counter() - begun
    tokens, calls = sum(a.num_committed for a in answers), sum(a.num_calls for a in answers)
    quality = measure_samples(Samples.of(prompts, [a.tokens for a in answers]), judge)
    return {
        "tokens": tokens,
        "calls": calls,
        "tokens_per_call": tokens / max(calls, 1),
        "tokens_per_s": tokens / seconds,
        "quality": None if quality is None else {**asdict(quality), "perplexity": asdict(quality.perplexity)},
    }
