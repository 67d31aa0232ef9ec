"""What is measured of one model, each a task of its own; plain data, each figure with its standard error.

`learning` and `repetition` (held-out likelihood) -> `context` (one side or both) -> `flexibility` (holes, editing) ->
`answers` (the task). `generation.py` is apart: its speeds are measured one after the other in one process.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from dllm_core.checkpoints.bundle import read_bundle
from dllm_core.checkpoints.store import CheckpointStore
from dllm_core.data.loader import TokenRows, documents_of, evenly, split_rows
from dllm_core.decoding.config import DecodeConfig
from dllm_core.decoding.request import Request
from dllm_core.estimate import measure_seed, proportion
from dllm_core.evaluation.config import Side
from dllm_core.evaluation.estimators import HeldoutRows, estimator_of_bundle
from dllm_core.evaluation.infill import Filler, Hole, cut_holes, score_holes, summarize_holes
from dllm_core.evaluation.likelihood import score_rows, side_by_side, summarize
from dllm_core.evaluation.tasks.measure import answer_problems, rooms_for, summarize_answers
from dllm_core.model.config import DenoiserConfig
from dllm_core.model.denoiser import Denoiser
from dllm_core.model.pretrained import assign_weights
from dllm_core.objective.config import AutoregressiveConfig, BlockDiffusionConfig, MaskedLMConfig
from dllm_core.seeding import Bools, Ints, Purpose, uniforms, uniforms64
from dllm_core.training.loop import EMA_NAME
from workflows.compare.recipe import CompareRecipe
from workflows.compare.speakers import Speaker
from workflows.compare.training import Entrant, device_of

_BATCH_ROWS = 32
_CONSTRAINT_ROWS = 8  # times as many rows are looked through for holes whose text matches


@dataclass(frozen=True)
class Question:
    """What a task is asked: a measure of one model, on its runs."""

    measure: str
    model: str
    entrants: tuple[Entrant, ...]
    recipe: CompareRecipe

    @property
    def gpus(self) -> float:
        """Of the task."""
        return self.recipe.placement.gpus_per_worker


def answer(question: Question) -> Any:
    """Measure; None where such a model cannot be asked this."""
    measures = {
        "learning": _learning,
        "repetition": _repetition,
        "context": _context,
        "flexibility": _flexibility,
        "task": _task,
    }
    device = device_of(question.gpus)
    with torch.inference_mode():
        return measures[question.measure](question, device)


def heldout_rows(entrant: Entrant, count: int) -> tuple[Ints, TokenRows]:
    """At most `count` held-out rows, evenly spaced, and their ids: the same rows for every model."""
    manifest = entrant.manifest
    rows = evenly(np.arange(manifest.heldout.rows), count)
    return rows, split_rows(entrant.run.store, manifest, manifest.heldout, rows)


def _learning(question: Question, device: torch.device) -> list[dict[str, Any]] | None:
    """A point for each checkpoint that the run kept."""
    [entrant] = question.entrants
    likelihood_of = _likelihood(question, entrant, device)
    if likelihood_of is None:
        return None
    checkpoints = CheckpointStore(entrant.run)
    denoiser = read_bundle(entrant.run).denoiser(str(device))
    points = []
    for step in checkpoints.committed():
        found = checkpoints.at(step)
        assign_weights(denoiser, load_file(found.files[EMA_NAME], device=str(device)), found.name)
        tokens = found.manifest.position.tokens_seen
        points.append({"step": step, "tokens": tokens, "likelihood": likelihood_of(denoiser)})
    return points


def _repetition(question: Question, device: torch.device) -> list[dict[str, Any]] | None:
    """The bundle of each run over the small share of the text."""
    points = []
    for entrant in question.entrants:
        likelihood_of = _likelihood(question, entrant, device)
        if likelihood_of is None:
            return None
        tokens = entrant.manifest.train.tokens
        likelihood = likelihood_of(read_bundle(entrant.run).denoiser(str(device)))
        points.append({"data": entrant.data, "corpus_tokens": tokens, "likelihood": likelihood})
    return points


def _likelihood(
    question: Question, entrant: Entrant, device: torch.device
) -> Callable[[Denoiser], dict[str, Any]] | None:
    """What scores denoisers on the run's held-out rows, which are read once; None where there is no likelihood."""
    bundle, section = read_bundle(entrant.run), question.recipe.learning
    estimator = estimator_of_bundle(bundle, str(device))
    if estimator is None:
        return None
    manifest, store = entrant.manifest, entrant.run.store
    ids = evenly(np.arange(manifest.heldout.rows), section.rows)
    batches = [ids[start : start + _BATCH_ROWS] for start in range(0, len(ids), _BATCH_ROWS)]
    parts = [HeldoutRows.of(split_rows(store, manifest, manifest.heldout, rows), rows) for rows in batches]
    counted = np.concatenate([part.x0[part.counted] for part in parts])
    counts = np.bincount(counted, minlength=manifest.vocab_size)
    byte_lengths, seed = bundle.tokenizer().byte_lengths(), entrant.recipe.seed
    documents = _documents(entrant, bundle.config, ids)

    def score(denoiser: Denoiser) -> dict[str, Any]:
        scores = [score_rows(denoiser, estimator, part, seed=seed, draws=section.draws) for part in parts]
        return asdict(summarize(side_by_side(scores), counts, byte_lengths, estimator.name, documents))

    return score


def speaker_of(entrant: Entrant, device: torch.device) -> Speaker:
    """Its bundle, with its ways to write."""
    return Speaker(read_bundle(entrant.run), device, entrant.recipe.seed, entrant.recipe.decode)


def _context(question: Question, device: torch.device) -> dict[str, Any] | None:
    """Accuracy of the tokens of one hole a row, by the side that is seen and the distance to what is seen."""
    [entrant] = question.entrants
    speaker, section = speaker_of(entrant, device), question.recipe.context
    filler = speaker.filler(None)
    if filler is None:
        return None
    holes = _holes(entrant, speaker.bundle.config, section.rows, section.length)
    documents = _documents_of(entrant, speaker.bundle.config, holes)
    found = {
        side: summarize_holes(score_holes(filler, holes, section.length, side), documents) for side in filler.sides
    }
    return {side: asdict(infilling) for side, infilling in found.items() if infilling is not None}


def _holes(entrant: Entrant, config: DenoiserConfig, count: int, length: int, part: slice = slice(None)) -> list[Hole]:
    """Holes in the columns `part` of held-out rows."""
    ids, tokens = heldout_rows(entrant, count)
    segment_ids = None if tokens.segment_ids is None else tokens.segment_ids[:, part]
    rows = HeldoutRows(tokens.x0[:, part], tokens.is_learned[:, part], ids, tokens.is_real[:, part], segment_ids)
    never = (config.mask_id, config.eos_id, config.pad_id)
    return cut_holes(rows, length, seed=entrant.recipe.seed, never=never)


def _documents_of(entrant: Entrant, config: DenoiserConfig, holes: Sequence[Hole]) -> Ints:
    """Which held-out document each hole is in; holes in the order of their rows."""
    return _documents(entrant, config, np.array([hole.row_id for hole in holes], np.int64))


def _documents(entrant: Entrant, config: DenoiserConfig, rows: Ints) -> Ints:
    """Which document each of these rising held-out rows is of."""
    manifest = entrant.manifest
    return documents_of(entrant.run.store, manifest, manifest.heldout, rows, config.eos_id)


def _flexibility(question: Question, device: torch.device) -> dict[str, Any]:
    """Holes of several lengths, two in a row at once, and text to be mended; as it is served, but for the editing."""
    [entrant] = question.entrants
    speaker, section = speaker_of(entrant, device), question.recipe.flexibility
    served = speaker.served.model_copy(update={"temperature": 0.0})
    filler = speaker.filler(served)
    result: dict[str, Any] = {"holes": [], "two_holes": None, "constraint": None}
    result["editing"] = _editing(question, entrant, speaker)
    if filler is None:
        return result
    side, config = _widest(filler), speaker.bundle.config
    for length in section.lengths:
        holes = _holes(entrant, config, section.rows, length)
        found = summarize_holes(score_holes(filler, holes, length, side), _documents_of(entrant, config, holes))
        if found is not None:
            result["holes"].append(asdict(found))
    if "left" in filler.sides:  # while the first is filled the second must be hidden, or not be seen
        result["two_holes"] = two_holes(entrant, filler, section.rows, section.lengths[len(section.lengths) // 2])
    result["constraint"] = _constraint(question, entrant, speaker, served)
    return result


def _constraint(question: Question, entrant: Entrant, speaker: Speaker, served: DecodeConfig) -> dict[str, Any] | None:
    """Holes whose text matches a regular expression, restored by a model that is told so and by one that is not.

    None where no constraint can be kept: where tokens are replaced, none is ever settled.
    """
    section, engine = question.recipe.flexibility, speaker.engine
    if engine is None or engine.is_ancestral:
        return None
    length = section.lengths[len(section.lengths) // 2]
    tokenizer = speaker.bundle.tokenizer()
    found = _holes(entrant, speaker.bundle.config, _CONSTRAINT_ROWS * section.rows, length)
    holes = [hole for hole in found if re.fullmatch(section.regex, tokenizer.decode(hole.truth.tolist()))][
        : section.rows
    ]
    if len(holes) < 2:
        return None
    sees_behind = not isinstance(speaker.objective, AutoregressiveConfig | BlockDiffusionConfig)
    config, told = served.model_copy(update={"max_tokens": length}), {}
    ones, documents = np.ones(len(holes)), _documents_of(entrant, speaker.bundle.config, holes)
    for name, regex in (("untold", None), ("told", section.regex)):
        answers = engine.generate(
            [
                Request(
                    prompt=tuple(hole.before.tolist()),
                    config=config,
                    suffix=tuple(hole.after.tolist()) if sees_behind else (),
                    seed=entrant.recipe.seed + hole.row_id,
                    constraint=regex,
                )
                for hole in holes
            ]
        )
        matches = [bool(re.fullmatch(section.regex, tokenizer.decode(answer.tokens))) for answer in answers]
        exact = [answer.tokens == hole.truth.tolist() for answer, hole in zip(answers, holes, strict=True)]
        told[name] = {
            "matches": asdict(proportion(matches, ones, documents)),
            "exact": asdict(proportion(exact, ones, documents)),
        }
    return {"regex": section.regex, "length": length, "holes": len(holes), **told}


def two_holes(entrant: Entrant, filler: Filler, rows: int, length: int) -> dict[str, Any] | None:
    """One hole in each half of a row, both in one document: the first is filled while the second is masked, the second
    given the first.

    By the chain rule that is one way to fill both; what stands between them is a constraint on both.
    """
    config, half = read_bundle(entrant.run).config, entrant.recipe.packing.seq_len // 2
    halves = [
        {hole.row_id: hole for hole in _holes(entrant, config, rows, length, part)}
        for part in (slice(None, half), slice(half, None))
    ]
    in_both = halves[0].keys() & halves[1].keys()
    shared = sorted(row for row in in_both if halves[0][row].document == halves[1][row].document)
    if not shared:
        return None
    side = _widest(filler)
    firsts, seconds = ([part[row] for row in shared] for part in halves)
    masked = np.full(length, config.mask_id, np.int64)
    opened = [
        replace(a, after=np.concatenate([a.after, b.before, masked, b.after]))
        for a, b in zip(firsts, seconds, strict=True)
    ]
    first = filler.fill(opened, side)
    filled = [
        replace(b, before=np.concatenate([a.before, _as_text(done.tokens, config.eos_id), a.after, b.before]))
        for a, b, done in zip(firsts, seconds, first, strict=True)
    ]
    second = filler.fill(filled, side)
    hits = np.array(
        [
            [np.sum(a.truth == x.tokens), np.sum(b.truth == y.tokens)]
            for a, b, x, y in zip(firsts, seconds, first, second, strict=True)
        ]
    )
    documents = _documents_of(entrant, config, firsts)
    return {
        "length": length,
        "exact": asdict(proportion((hits == length).all(1), np.ones(len(hits)), documents)),
        "token": asdict(proportion(hits.sum(1), np.full(len(hits), 2 * length), documents)),
    }


def _widest(filler: Filler) -> Side:
    return "both" if "both" in filler.sides else "left"


def _as_text(tokens: Ints, eos_id: int) -> Ints:
    """What a filler gave, as ids; -1 stands behind the end of an answer that broke off."""
    return np.where(tokens < 0, eos_id, tokens)


def _editing(question: Question, entrant: Entrant, speaker: Speaker) -> dict[str, Any] | None:
    """Some tokens are replaced at random, and one call has to find and mend them without breaking the others.

    None for models that look at no token's own position: there the question is another one. A masked diffusion model
    answers by its law that what is no mask is right: it keeps all and mends nothing.
    """
    if isinstance(speaker.objective, AutoregressiveConfig | BlockDiffusionConfig):
        return None
    section = question.recipe.flexibility
    ids, tokens = heldout_rows(entrant, section.rows)
    x0, length, vocabulary = tokens.x0, tokens.x0.shape[1], entrant.manifest.vocab_size
    seed = measure_seed(entrant.recipe.seed, "editing")
    is_broken = (uniforms(seed, Purpose.EVALUATE, 0, ids, length) < section.broken) & tokens.is_learned
    shift = 1 + (uniforms64(seed, Purpose.EVALUATE_REPLACE, 0, ids, length) * (vocabulary - 1)).astype(np.int64)
    shown = np.where(is_broken, (x0 + shift) % vocabulary, x0)
    shown = np.where(is_broken & (shown == speaker.mask_id), (shown + 1) % vocabulary, shown)
    is_broken &= shown != x0
    given = restored(speaker, shown, tokens.is_real, section.broken, tokens.segment_ids)
    kept, documents = tokens.is_learned & ~is_broken, _documents(entrant, speaker.bundle.config, ids)

    def share(right: Bools, of: Bools) -> dict[str, Any]:
        return asdict(proportion((right & of).sum(1), of.sum(1), documents))

    return {
        "broken": section.broken,
        "mended": share(given == x0, is_broken),
        "kept": share(given == x0, kept),
        "right_before": share(kept, tokens.is_learned),
        "right_after": share(given == x0, tokens.is_learned),
    }


def restored(speaker: Speaker, shown: Ints, is_real: Bools, broken: float, segment_ids: Any = None) -> Ints:
    """The likeliest clean token at every position [N L], by one call a row, where a share `broken` is replaced.
    segment_ids: isolated documents, which see themselves alone, as in training.

    A denoiser of replaced tokens tells each token's law given all *others* (`noise/interpolating.py`): what stands in
    its place is evidence of its own, q(shown | x0), 1 - broken for the token itself. t is where so much is noise.
    """
    process, has_time = speaker.bundle.process, speaker.bundle.config.model.time_conditioning
    if not process.replaces and not isinstance(speaker.objective, MaskedLMConfig):
        return shown
    given, time = np.empty_like(shown), float(process.schedule.inverse(np.float64(1 - broken)))
    for start in range(0, len(shown), _BATCH_ROWS):
        at = slice(start, start + _BATCH_ROWS)
        ids, real = (torch.from_numpy(part[at]).to(speaker.device) for part in (shown, is_real))
        told = {"t": torch.full((len(ids),), time, device=speaker.device)} if has_time else {}
        if segment_ids is not None:
            told["segment_ids"] = torch.from_numpy(segment_ids[at]).to(speaker.device)
        logits = speaker.denoiser(ids, real, **told).float()
        if process.replaces:
            others = logits.shape[-1] - 2  # neither the mask nor the token itself
            evidence = math.log((1 - broken) * others / broken)
            logits.scatter_add_(-1, ids[..., None], torch.full_like(logits[..., :1], evidence))
        logits[..., speaker.mask_id] = -torch.inf
        given[at] = logits.argmax(-1).cpu().numpy()
    return given


def _task(question: Question, device: torch.device) -> dict[str, Any] | None:
    """Exact match on problems that training never saw."""
    [entrant] = question.entrants
    section = question.recipe.task
    assert section is not None
    speaker = speaker_of(entrant, device)
    served = speaker.served.model_copy(update={"temperature": 0.0})
    writer = speaker.writer(served)
    if writer is None:
        return None
    problems = section.problem.problems("test", section.problems, seed=entrant.recipe.seed)
    tokenizer, seed = speaker.bundle.tokenizer(), entrant.recipe.seed
    rooms = rooms_for(tokenizer, problems, entrant.recipe.packing.seq_len)
    answered = answer_problems(writer, tokenizer, section.problem, problems, rooms=rooms, seed=seed)
    found = summarize_answers(answered)
    return None if found is None else {**asdict(found), "examples": _examples(problems, answered)}


def _examples(problems: Sequence[Any], answered: Sequence[Any]) -> list[dict[str, Any]]:
    pairs = list(zip(problems, answered, strict=True))[:3]
    return [{"prompt": p.prompt, "answer": a.text, "is_correct": a.grade.is_correct} for p, a in pairs]
