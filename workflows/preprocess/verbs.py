"""The preprocess verbs beside `run`: plan (what it would do), verify (is it whole), repair (what is not), inspect.

dllm preprocess verify workflows/recipes/quickstart.yaml
"""

from dataclasses import asdict, replace
from functools import partial
from typing import Any

from dllm_core.data.build import tokenizer_of
from dllm_core.data.manifest import NAME, CorpusManifest, read_manifest, read_tokenizer
from dllm_core.data.receipts import DECISIONS, SIGNATURES, TOKENS, Step, noise_step, shards_of
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.data.verify import (
    Problem,
    Promise,
    checks_of,
    quarantine_checks,
    quarantine_problem,
    summary_problem,
    verify_shard,
)
from dllm_core.errors import DataError
from dllm_core.model.special_ids import TOKENIZER_NAME
from dllm_core.storage.store import sha256
from workflows.fan_out import FanOut
from workflows.preprocess.estimate import estimate
from workflows.preprocess.flow import CorpusPlan, OnProgress, Preprocessing

# A Ray worker with pyarrow, numpy and a tokenizer, measured; half of it are words that `fastokens` remembers. Units
# come on top.
_WORKER_MIB = 420


def plan(corpus: CorpusPlan) -> dict[str, Any]:
    """What a run would read and make. Nothing is written; a sample of about 1 MB is tokenized for the estimates.

    tokens, rows, disk_bytes and seconds are None where a hub does not tell how much it has.
    """
    recipe, job, units = corpus.recipe, corpus.job(), corpus.units()
    [finished] = job.receipts.all_finished(TOKENS)
    done = sum(unit.index in finished for unit in units)
    found = estimate(recipe, job, units)
    workers = recipe.placement.preprocess.workers
    return {
        "corpus": corpus.url,
        "files": sum(len(files.files) for files in corpus.listed),
        "input_bytes": corpus.num_bytes,
        "units": len(units),
        "units_done": done,
        "shards": len(units) * (2 + recipe.noise.epochs),
        "tokens": found.tokens,
        "rows": found.rows,
        "disk_bytes": None if found.rows is None else corpus.disk_bytes(found.rows),
        "seconds": found.seconds,
        "memory_bytes": min(workers, len(units)) * ((_WORKER_MIB << 20) + 8 * found.unit_bytes),
        "workers": workers,
        "tokenizer_engine": found.engine,
    }


def verify(corpus: CorpusPlan, fan_out: FanOut, on_progress: OnProgress) -> list[Problem]:
    """Everything that is wrong with a finished corpus; an unreadable manifest is a DataError."""
    return _bad_shards(corpus, *_promised(corpus), fan_out, on_progress)


def _promised(corpus: CorpusPlan) -> tuple[CorpusManifest, Tokenizer]:
    """Manifest and tokenizer of a finished corpus; a DataError if one of them is not as it was written."""
    manifest = read_manifest(corpus.store, corpus.fingerprint)
    tokenizer = read_tokenizer(corpus.store, manifest)
    manifest.accounting.check(f"{corpus.url}/{NAME}")
    return manifest, tokenizer


def _bad_shards(
    corpus: CorpusPlan, manifest: CorpusManifest, tokenizer: Tokenizer, fan_out: FanOut, on_progress: OnProgress
) -> list[Problem]:
    job = corpus.job()
    checks = checks_of(job, manifest)
    placement = corpus.recipe.placement.preprocess
    on_progress("shards", 0, len(checks))
    found = fan_out(
        partial(verify_shard, job, Promise.of(manifest, tokenizer.mask_id)),
        checks,
        workers=placement.workers,
        demand=placement.demand,
        on_done=lambda done, result: on_progress("shards", done, len(checks)),
    )
    return [problem for problem in (*found, summary_problem(job, manifest)) if problem is not None]


def repair(corpus: CorpusPlan, fan_out: FanOut, on_progress: OnProgress) -> dict[str, Any]:
    """Run again exactly what is bad or missing: the steps whose receipts are taken back. Then verify."""
    job, store = corpus.job(), corpus.store
    try:
        promised = _promised(corpus)
    except DataError as error:
        problems = _without_manifest(corpus, error)
    else:  # a check that was lost with its worker says nothing of the manifest
        corpus = _with_epochs(corpus, len(promised[0].noise_epochs))
        problems = _bad_shards(corpus, *promised, fan_out, on_progress)
    for problem in problems:
        if problem.receipt is not None:
            store.delete(job.key(problem.receipt))
    work = Preprocessing(corpus, fan_out, on_progress)
    if problems:
        work.run()
    left = verify(corpus, fan_out, on_progress)
    if left:
        raise DataError(left[0].key, f"still {left[0].what}", remedy=f"delete {corpus.url} and run again")
    return {"corpus": corpus.url, "repaired": [asdict(problem) for problem in problems], "tasks_run": work.ran}


def _with_epochs(corpus: CorpusPlan, written: int) -> CorpusPlan:
    """With all noise that was written, also where this recipe asks for less: the manifest would lose the rest."""
    noise = corpus.recipe.noise
    noise = noise.model_copy(update={"epochs": max(noise.epochs, written)})
    return replace(corpus, recipe=corpus.recipe.model_copy(update={"noise": noise}))


def _without_manifest(corpus: CorpusPlan, error: DataError) -> list[Problem]:
    """A manifest or tokenizer that cannot be read: receipts still say what was made, and each file is looked at."""
    job = corpus.job()
    problems = [Problem(NAME, error.problem)]
    [tokenized] = job.receipts.all_finished(TOKENS)
    key, made = job.key(TOKENIZER_NAME), tokenizer_of(job, tokenized.values())
    if not job.output.exists(key) or sha256(job.output.read(key)) != made:
        problems.append(Problem(TOKENIZER_NAME, "is not the tokenizer of the shards", TOKENIZER_NAME))
    of_files = (SIGNATURES, DECISIONS, *map(noise_step, range(corpus.recipe.noise.epochs)))
    found: list[tuple[Step[Any], dict[int, Any]]] = [(TOKENS, tokenized)]
    found += zip(of_files, job.receipts.all_finished(*of_files), strict=True)
    for step, receipts in found:
        for unit, receipt in receipts.items():
            for shard in shards_of(receipt):
                if sha256(job.output.read(job.key(shard.key))) != shard.sha256:
                    problems.append(Problem(shard.key, "does not match its sha256", step.key(unit)))
    removed = (quarantine_problem(job, check) for check in quarantine_checks(tokenized.values()))
    return [*problems, *(problem for problem in removed if problem is not None)]
