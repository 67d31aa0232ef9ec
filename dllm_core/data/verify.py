"""Verify: does a finished corpus hold what its manifest promises? Each check is of one shard, so any worker does it.

Arrow's own validation passes a flipped bit: what counts is the sha256, then what the numbers mean.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from dllm_core.data.build import CorpusJob
from dllm_core.data.loader import corpus_noise, evenly
from dllm_core.data.manifest import Accounting, CorpusManifest, first_rows
from dllm_core.data.noising import CorpusNoise, token_flags
from dllm_core.data.packing import AnyPacking
from dllm_core.data.quarantine import SUMMARY
from dllm_core.data.receipts import DECISIONS, SIGNATURES, TOKENS, UnitReceipt, noise_step
from dllm_core.data.shard import ShardInfo, id_type, map_shard, map_with_metadata
from dllm_core.errors import DataError
from dllm_core.storage.store import sha256

_SAMPLE_ROWS = 64


@dataclass(frozen=True)
class Promise:
    """What a check needs of the manifest: its tables of shards go to no task (223,517 units took 5 s to unpickle)."""

    tokenizer_sha256: str
    vocab_size: int
    packing: AnyPacking
    noise: CorpusNoise

    @classmethod
    def of(cls, manifest: CorpusManifest, mask_id: int) -> "Promise":
        """Of a finished corpus."""
        noise = corpus_noise(manifest, mask_id)
        return cls(manifest.tokenizer_sha256, manifest.vocab_size, manifest.packing, noise)


@dataclass(frozen=True)
class ShardCheck:
    """One file to look at. receipt: key of the one that vouches for it.

    Of noise: epoch, its token shard and the row id there; otherwise None. What a first pass left is only hashed.
    """

    shard: ShardInfo
    receipt: str
    epoch: int | None = None
    tokens: ShardInfo | None = None
    first_row: int = 0
    is_intermediate: bool = False


@dataclass(frozen=True)
class QuarantineCheck:
    """What a unit removed: so many records. sha256: of the file, None where an older receipt does not say it."""

    key: str
    records: int
    sha256: str | None
    receipt: str


@dataclass(frozen=True)
class LostReceipt:
    """Of a unit that may have removed records, which nothing else names."""

    key: str


AnyCheck = ShardCheck | QuarantineCheck | LostReceipt


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file. receipt: what to take back so that it is made again, None if it is no task's."""

    key: str
    what: str
    receipt: str | None = None


def checks_of(job: CorpusJob, manifest: CorpusManifest) -> list[AnyCheck]:
    """Every shard: tokens, held-out tokens, noise; what was removed; what the search for duplicates left."""
    shards_of_tokens = (*manifest.train.shards, *manifest.heldout.shards)
    checks: list[AnyCheck] = [ShardCheck(shard, TOKENS.key(shard.unit)) for shard in shards_of_tokens]
    starts = first_rows(manifest.train.shards)
    for epoch, shards in enumerate(manifest.noise_epochs):
        for shard, tokens, first_row in zip(shards, manifest.train.shards, starts, strict=True):
            checks.append(ShardCheck(shard, noise_step(epoch).key(shard.unit), epoch, tokens, first_row))
    found = job.receipts.of_all(TOKENS)
    made = {unit: found[unit] for unit in range(manifest.units) if unit in found}
    checks += quarantine_checks(made.values())
    if sum(receipt.accounting.num_removed for receipt in made.values()) < manifest.accounting.num_removed:
        checks += [LostReceipt(TOKENS.key(unit)) for unit in range(manifest.units) if unit not in made]
    if job.corpus.dedup is not None:
        for step in (SIGNATURES, DECISIONS):
            for unit, receipt in sorted(job.receipts.of_all(step).items()):
                if unit < manifest.units:
                    checks.append(ShardCheck(receipt.shard, step.key(unit), is_intermediate=True))
    return checks


def quarantine_checks(receipts: Iterable[UnitReceipt]) -> list[QuarantineCheck]:
    """Of each unit that removed anything."""
    checks = []
    for made in receipts:
        if made.quarantine is not None:
            removed = made.accounting.num_removed
            checks.append(QuarantineCheck(made.quarantine, removed, made.quarantine_sha256, TOKENS.key(made.unit)))
    return checks


def summary_problem(job: CorpusJob, manifest: CorpusManifest) -> Problem | None:
    """What is wrong with the accounting that people read: it is the manifest's, written down once more."""
    try:
        is_same = Accounting.model_validate_json(job.output.read(job.key(SUMMARY))) == manifest.accounting
    except (DataError, ValueError):
        is_same = False
    return None if is_same else Problem(SUMMARY, "is not the accounting of the manifest")


def verify_shard(job: CorpusJob, promise: Promise, check: AnyCheck) -> Problem | None:
    """The first thing that is wrong with a file, or None."""
    if isinstance(check, LostReceipt):
        return Problem(check.key, "is missing or damaged, and with it what its unit removed", check.key)
    if isinstance(check, QuarantineCheck):
        return quarantine_problem(job, check)
    try:
        if check.is_intermediate:
            map_shard(job.output, job.prefix, check.shard)
            return None
        is_noise = check.epoch is not None
        what = _noise(job, promise, check) if is_noise else _tokens(job, promise, check.shard)
    except DataError as error:
        what = error.problem
    except (pa.ArrowException, KeyError, ValueError) as error:
        what = f"cannot be read ({error})"
    return None if what is None else Problem(check.shard.key, what, check.receipt)


def quarantine_problem(job: CorpusJob, check: QuarantineCheck) -> Problem | None:
    """What is wrong with what a unit removed. What an older receipt vouches for is counted alone."""
    key, what = job.key(check.key), None
    data = job.output.read(key) if job.output.exists(key) else None
    if data is None:
        what = f"is missing, with the {check.records} records that were removed"
    elif check.sha256 not in (None, sha256(data)):
        what = "does not match its sha256"
    elif (lines := data.count(b"\n")) != check.records:
        what = f"holds {lines} records, {check.records} were removed"
    return None if what is None else Problem(check.key, what, check.receipt)


def _tokens(job: CorpusJob, promise: Promise, shard: ShardInfo) -> str | None:
    views, metadata = map_with_metadata(job.output, job.prefix, shard)
    ids, counts = views["ids"], views["num_tokens"]
    if ids.shape != (shard.rows, promise.packing.seq_len) or ids.dtype != id_type(promise.vocab_size):
        return f"ids are {ids.dtype} {list(ids.shape)}, not [{shard.rows} {promise.packing.seq_len}]"
    if promise.packing.isolates != ("starts" in views):
        return "document boundaries are not as the packing asks"
    if len(ids) and int(ids.max()) >= promise.vocab_size:
        return f"holds the id {int(ids.max())}, the vocabulary ends at {promise.vocab_size}"
    if len(counts) and not 1 <= int(counts.min()) <= int(counts.max()) <= promise.packing.seq_len:
        return "counts more tokens than a row has"
    if int(counts.sum()) != shard.tokens:
        return f"holds {int(counts.sum())} tokens, the manifest says {shard.tokens}"
    if metadata.get("tokenizer_sha256") != promise.tokenizer_sha256:
        return "was made by another tokenizer than the manifest's"
    return None


def _noise(job: CorpusJob, promise: Promise, check: ShardCheck) -> str | None:
    assert check.tokens is not None
    assert check.epoch is not None
    views = map_shard(job.output, job.prefix, check.shard)
    if len(views["t"]) != check.tokens.rows:
        return f"holds noise of {len(views['t'])} rows, its tokens have {check.tokens.rows}"
    try:
        tokens = map_shard(job.output, job.prefix, check.tokens)
    except DataError:
        return None  # the check of the tokens says so; this file is what the manifest promises
    rows = evenly(np.arange(check.tokens.rows), _SAMPLE_ROWS)
    some = {name: column[rows] for name, column in tokens.items()}
    x0, flags = some["ids"].astype(np.int64), token_flags(some, promise.packing.seq_len)
    noise = promise.noise
    xt, t = noise.corrupt(check.epoch, check.first_row + rows, x0, **flags)
    computed = noise.columns(x0, xt, t)
    if computed.keys() == views.keys() and all(np.array_equal(views[name][rows], computed[name]) for name in views):
        return None
    return "is not the noise that is computed for these rows"
