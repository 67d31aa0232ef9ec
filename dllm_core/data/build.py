"""The steps that make a corpus, each a pure function of its arguments that can be killed and run again.

`sign_unit` and `decide`: which documents are duplicates, in the whole corpus (skipped if the recipe asks for none).
`tokenize_unit`: records -> token shards, quarantine, receipt. `noise_shard`: a token shard -> its noise of an epoch.
Each leaves a receipt last (`receipts.py`).
"""

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from dllm_core.data.corpus import AnyCorpus, ChatRecord, HubSource, PairRecord, PreferenceRecord
from dllm_core.data.dedup import Signatures, duplicates, signatures, text_digest
from dllm_core.data.encoding import Encoder
from dllm_core.data.filters import first_reason
from dllm_core.data.manifest import Accounting
from dllm_core.data.noising import CorpusNoise, pack_bits, token_flags
from dllm_core.data.packing import AnyPacking, Rows
from dllm_core.data.quarantine import Removed, removed_lines
from dllm_core.data.readers import read_unit
from dllm_core.data.receipts import (
    DECISIONS,
    SIGNATURES,
    TOKENS,
    FileReceipt,
    Receipts,
    UnitReceipt,
    noise_step,
    shards_of,
)
from dllm_core.data.records import BadRecord, Document, is_blank
from dllm_core.data.shard import OpenShards, ShardInfo, map_shard, map_with_metadata, put_shard, to_arrow
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.data.units import Unit
from dllm_core.errors import DataError
from dllm_core.noise.times import GOLDEN
from dllm_core.storage.store import Store, sha256

SPLITS = ("train", "heldout")
_MAPPED_SIGNATURES = 1 << 15  # half of what a process may map; one more is mapped again for each band, in 0.2 ms
_WEIGHT = 1  # the salt of another decision about the same text


@dataclass(frozen=True)
class CorpusJob:
    """All that a worker needs to know of a corpus in the making; `prefix` is its folder in `output`."""

    corpus: AnyCorpus
    stores: tuple[Store, ...]
    output: Store
    prefix: str
    packing: AnyPacking

    def key(self, name: str) -> str:
        """Full key of something in the corpus's folder."""
        return f"{self.prefix}/{name}"

    @property
    def receipts(self) -> Receipts:
        """Those of the corpus: what is done of it."""
        return Receipts(self.output, self.prefix)


def _share(text: str, salt: int = 0) -> float:
    """A number in [0, 1) that a text and a salt decide. XXH3: a tenth of SHA-256's time, which was 1/9 of a task's."""
    return float(xxhash.xxh3_64_intdigest(text.encode(), seed=salt) / 2**64)


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: by the hash of its text, so equal documents are on one side."""
    return _share(text) < fraction


def copies(text: str, weight: float) -> int:
    """How often a training document is taken: `weight` times in the mean, decided by its hash."""
    whole = int(weight)
    return whole if whole == weight else whole + int(_share(text, _WEIGHT) < weight - whole)


def sample_texts(job: CorpusJob, units: Sequence[Unit], limit_bytes: int) -> list[str]:
    """Training documents in unit order, up to `limit_bytes`: what a tokenizer is trained on.

    Each unit gives its share, and one document at least: where documents are longer than that, of evenly spread units.
    """
    share = max(1, limit_bytes // max(1, len(units)))
    of_unit: dict[int, list[str]] = {}
    size = 0
    for number in spread(len(units)):
        texts = of_unit[number] = _first_texts(job, units[number], share)
        size += sum(len(text.encode()) for text in texts)
        if size >= limit_bytes:
            break
    return [text for number in sorted(of_unit) for text in of_unit[number]]


def spread(count: int) -> list[int]:
    """The numbers below `count`, of which any first ones are evenly spread, even ones and odd ones alike.

    So files of two languages may take turns, too.
    """
    return sorted(range(count), key=lambda number: number * int(GOLDEN) % (1 << 64))


def _first_texts(job: CorpusJob, unit: Unit, at_least: int) -> list[str]:
    """The pieces of a unit's first training documents, of so many bytes if it has them."""
    texts: list[str] = []
    size = 0
    for document in documents(job, unit):
        if is_heldout(document.subject, job.corpus.heldout_fraction):
            continue
        texts += document.pieces
        size += sum(len(piece.encode()) for piece in document.pieces)
        if size >= at_least:
            break
    return texts


def documents(job: CorpusJob, unit: Unit) -> Iterator[Document]:
    """A unit's documents that are not bad and that no filter drops, in order."""
    return (record for record, reason in _sifted(job, unit) if reason is None and isinstance(record, Document))


def first_reason_to_drop(job: CorpusJob, unit: Unit) -> str | None:
    """Why the first of a unit's records that is dropped is; None where none is."""
    return next((reason for _, reason in _sifted(job, unit) if reason is not None), None)


def _sifted(job: CorpusJob, unit: Unit) -> Iterator[tuple[Document | BadRecord, str | None]]:
    """Every record of a unit with the reason for which it is dropped, or None: what both passes agree on."""
    for record in read_unit(job.corpus, job.stores, unit):
        if isinstance(record, BadRecord):
            yield record, record.reason
        elif is_blank(record.text):
            yield record, "empty"
        else:
            yield record, first_reason(job.corpus.filters, record.text)


def signature_key(unit: int) -> str:
    """Where the signatures of a unit's documents stand."""
    return f"dedup/signatures-{unit:06d}.arrow"


def decisions_key(unit: int) -> str:
    """Where it stands which of a unit's documents are duplicates."""
    return f"dedup/decisions-{unit:06d}.arrow"


def sign_unit(job: CorpusJob, unit: Unit) -> FileReceipt:
    """First pass: the signatures of a unit's documents that no filter drops, in order."""
    assert job.corpus.dedup is not None
    found = signatures((document.text for document in documents(job, unit)), job.corpus.dedup)
    data = to_arrow(found.to_columns(), {"unit": str(unit.index)})
    name = signature_key(unit.index)
    info = put_shard(job.output, job.prefix, name, data, unit=unit.index, rows=len(found), tokens=0)
    receipt = FileReceipt(shard=info)
    job.receipts.write(SIGNATURES, unit.index, receipt)
    return receipt


class _StoredSignatures(Sequence[Signatures]):
    """Those of all units, each mapped when it is asked for."""

    def __init__(self, shards: OpenShards, infos: Sequence[ShardInfo]) -> None:
        self._shards, self._infos = shards, infos

    def __len__(self) -> int:
        return len(self._infos)

    def __getitem__(self, unit: Any) -> Any:
        return Signatures.from_columns(self._shards.views(self._infos[unit]))


def decide(job: CorpusJob, receipts: Sequence[FileReceipt]) -> None:
    """Between the passes: which documents of the whole corpus go, written down for each unit with what tells them."""
    assert job.corpus.dedup is not None
    shards = OpenShards(job.output, job.prefix, _MAPPED_SIGNATURES)
    parts = _StoredSignatures(shards, [receipt.shard for receipt in receipts])
    for receipt, part, found in zip(receipts, parts, duplicates(parts, job.corpus.dedup), strict=True):
        unit = receipt.shard.unit
        columns: dict[str, NDArray[Any]] = {"representative": found.representative, "digest": part.digest}
        columns["is_exact"] = found.is_exact.astype(np.uint8)
        data, rows = to_arrow(columns, {"unit": str(unit)}), len(found.representative)
        info = put_shard(job.output, job.prefix, decisions_key(unit), data, unit=unit, rows=rows, tokens=0)
        job.receipts.write(DECISIONS, unit, FileReceipt(shard=info))


class _Decisions:
    """Which documents of a unit are duplicates, asked for in their order."""

    def __init__(self, job: CorpusJob, unit: Unit) -> None:
        self._place = f"{job.output.url}/{job.key(decisions_key(unit.index))}"
        receipt = job.receipts.finished(DECISIONS, unit.index)
        if receipt is None:
            raise DataError(self._place, "went away or changed", remedy="run `dllm preprocess` again")
        self._remedy = f"delete {job.output.url}/{job.prefix} and run `dllm preprocess` again"
        views = map_shard(job.output, job.prefix, receipt.shard)
        self._representative, self._is_exact = views["representative"], views["is_exact"]
        # None: decided before digests were kept, so that only the number of documents can be compared.
        self._digests = views["digest"].astype("<u8").tobytes() if "digest" in views else None
        self._asked = 0

    def rule(self, document: Document) -> str | None:
        """The rule by which the next document goes, None where it stays. DataError if another one was decided on."""
        at = self._asked
        self._asked += 1
        is_known = at < len(self._representative)
        if is_known and self._digests is not None:
            is_known = self._digests[16 * at : 16 * at + 16] == text_digest(document.text)
        if not is_known:
            raise self._changed(f"that at {document.offset} of {document.key} is not the document that was decided on")
        if self._representative[at] < 0:
            return None
        return "exact" if self._is_exact[at] else "near"

    def check_all_asked(self) -> None:
        """Refuse a unit that has lost documents since."""
        if self._asked != len(self._representative):
            raise self._changed(f"of {len(self._representative)} documents {self._asked} are left")

    def _changed(self, what: str) -> DataError:
        return DataError(self._place, f"text or filters changed between two passes: {what}", remedy=self._remedy)


@dataclass
class _Sorted:
    """A unit's documents by where they go."""

    encoders: dict[str, Encoder]
    removed: list[Removed] = field(default_factory=list)
    bytes_in: int = 0
    documents_in: int = 0


def tokenize_unit(job: CorpusJob, tokenizer: Tokenizer, unit: Unit) -> UnitReceipt:
    """Read, sift, encode and pack one unit; write its two shards, its quarantine and, last, its receipt."""
    found = _sort(job, tokenizer, unit)
    encoders = found.encoders
    shards = {split: _token_shard(job, tokenizer, unit, split, encoders[split].rows()) for split in SPLITS}
    removed = [*found.removed, *(item for split in SPLITS for item in encoders[split].removed)]
    accounting = Accounting(
        bytes_in=found.bytes_in,
        documents_in=found.documents_in,
        **{split: encoders[split].kept for split in SPLITS},
        **{kind: _counted(removed, kind) for kind in ("filtered", "duplicates", "quarantined")},
    )
    quarantine = digest = None
    if removed:
        quarantine, lines = f"quarantine/unit-{unit.index:06d}.jsonl", removed_lines(removed)
        job.output.put(job.key(quarantine), lines)
        digest = sha256(lines)
    kept = {"quarantine": quarantine, "quarantine_sha256": digest}
    receipt = UnitReceipt(unit=unit.index, accounting=accounting, **shards, **kept)
    job.receipts.write(TOKENS, unit.index, receipt)
    return receipt


def _sort(job: CorpusJob, tokenizer: Tokenizer, unit: Unit) -> _Sorted:
    found = _Sorted({split: Encoder(tokenizer, job.packing) for split in SPLITS}, bytes_in=unit.num_bytes)
    decisions = None if job.corpus.dedup is None else _Decisions(job, unit)
    source = job.corpus.all_sources[unit.source]
    is_hub = isinstance(source, HubSource)
    for record, reason in _sifted(job, unit):
        found.documents_in += 1
        if is_hub:  # of files the unit knows
            found.bytes_in += len(record.raw if isinstance(record, BadRecord) else record.text.encode())
        if isinstance(record, BadRecord):
            found.removed.append(Removed(record, "quarantined", record.reason))
            continue
        if reason is not None:
            found.removed.append(Removed(record, "filtered", reason))
            continue
        rule = None if decisions is None else decisions.rule(record)
        if rule is not None:
            found.removed.append(Removed(record, "duplicates", rule))
        elif is_heldout(record.subject, job.corpus.heldout_fraction):
            found.encoders["heldout"].add(record)
        else:
            found.encoders["train"].add(record, copies(record.text, source.weight))
    if decisions is not None:
        decisions.check_all_asked()
    return found


def _counted(removed: list[Removed], kind: str) -> dict[str, int]:
    return dict(sorted(Counter(item.rule for item in removed if item.kind == kind).items()))


def _token_shard(job: CorpusJob, tokenizer: Tokenizer, unit: Unit, split: str, rows: Rows) -> ShardInfo:
    name = f"tokens/{split}-{unit.index:06d}.arrow"
    if not len(rows.ids):
        return ShardInfo(key=name, unit=unit.index, rows=0, tokens=0, bytes=0, sha256="")
    columns: dict[str, NDArray[Any]] = {"ids": rows.ids, "num_tokens": rows.num_tokens}
    if rows.starts is not None:
        columns["starts"] = pack_bits(rows.starts)
    if rows.is_learned is not None:
        columns["is_learned"] = pack_bits(rows.is_learned)
    data = to_arrow(columns, {"split": split, "unit": str(unit.index), "tokenizer_sha256": tokenizer.digest})
    tokens = int(rows.num_tokens.sum())
    return put_shard(job.output, job.prefix, name, data, unit=unit.index, rows=len(rows.ids), tokens=tokens)


def tokenizer_of(job: CorpusJob, receipts: Iterable[UnitReceipt]) -> str | None:
    """sha256 of the tokenizer that made the shards, as the first whole one tells; None where there is none."""
    for receipt in receipts:
        for shard in shards_of(receipt):
            with contextlib.suppress(DataError):
                return map_with_metadata(job.output, job.prefix, shard)[1]["tokenizer_sha256"]
    return None


def noise_shard(job: CorpusJob, noise: CorpusNoise, tokens: ShardInfo, first_row: int, epoch: int) -> FileReceipt:
    """Write down the noise of one token shard for one epoch, then the receipt."""
    sample_ids = first_row + np.arange(tokens.rows, dtype=np.int64)
    metadata = {"epoch": str(epoch), "unit": str(tokens.unit), "tokens_sha256": tokens.sha256}
    data = to_arrow(_noise_columns(job, noise, tokens, sample_ids, epoch), metadata)
    name = f"noise/epoch-{epoch:03d}/train-{tokens.unit:06d}.arrow"
    info = put_shard(job.output, job.prefix, name, data, unit=tokens.unit, rows=tokens.rows, tokens=tokens.tokens)
    receipt = FileReceipt(shard=info)
    job.receipts.write(noise_step(epoch), tokens.unit, receipt)
    return receipt


def _noise_columns(
    job: CorpusJob, noise: CorpusNoise, tokens: ShardInfo, sample_ids: NDArray[np.int64], epoch: int
) -> dict[str, NDArray[Any]]:
    """The noise of a token shard. Where masks fall depends on no token: then none is read."""
    with_prompts = ChatRecord | PairRecord | PreferenceRecord
    has_prompts = any(isinstance(record, with_prompts) for record in job.corpus.records)
    has_own_blocks = noise.block_length is not None and job.packing.isolates
    if not (noise.process.replaces or has_prompts or has_own_blocks):
        return noise.mask_columns(epoch, sample_ids, job.packing.seq_len)
    views = map_shard(job.output, job.prefix, tokens)
    x0 = views["ids"]  # as stored: int64 would be four times the bytes to move
    return noise.columns(x0, *noise.corrupt(epoch, sample_ids, x0, **token_flags(views, x0.shape[1])))
