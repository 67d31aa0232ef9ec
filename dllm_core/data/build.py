"""The two steps that make a corpus, each a pure function of its arguments that can be killed and run again.

`tokenize_unit`: records -> token shards + receipt. `noise_shard`: a token shard -> its noise of an epoch + receipt.
A receipt is written after its shard; a step whose receipt stands is not run again.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dllm_core.config.base import Frozen
from dllm_core.data.corpus import AnyCorpus, BadRecord, HubCorpus, Unit, read_unit
from dllm_core.data.manifest import Accounting
from dllm_core.data.noising import CorpusNoise, pack_bits
from dllm_core.data.packing import wrap
from dllm_core.data.shard import ShardInfo, id_type, map_shard, put_shard, to_arrow
from dllm_core.data.tokenizer import Tokenizer
from dllm_core.storage.store import Store

_ENCODE_AT_ONCE = 1024


class UnitReceipt(Frozen):
    """What became of one unit."""

    unit: int
    accounting: Accounting
    train: ShardInfo
    heldout: ShardInfo
    quarantine: str | None


AnyReceipt = TypeVar("AnyReceipt", UnitReceipt, ShardInfo)


@dataclass(frozen=True)
class CorpusJob:
    """All that a worker needs to know of a corpus in the making; `prefix` is its folder in `output`."""

    corpus: AnyCorpus
    source: Store
    output: Store
    prefix: str
    seq_len: int

    def key(self, name: str) -> str:
        """Full key of something in the corpus's folder."""
        return f"{self.prefix}/{name}"


def is_heldout(text: str, fraction: float) -> bool:
    """Whether a document is held out: by the hash of its text, so equal documents are on one side."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) < fraction * 2**64


def sample_texts(job: CorpusJob, units: Sequence[Unit], limit_bytes: int) -> list[str]:
    """Training documents from evenly spaced units, up to `limit_bytes`: what a tokenizer is trained on."""
    texts, size = [], 0
    share = max(1, limit_bytes // max(1, len(units)))
    for unit in units:
        of_unit = 0
        for record in read_unit(job.corpus, job.source, unit):
            if isinstance(record, BadRecord) or is_heldout(record.text, job.corpus.heldout_fraction):
                continue
            texts.append(record.text)
            of_unit += len(record.text.encode())
            if of_unit >= share:
                break
        size += of_unit
        if size >= limit_bytes:
            break
    return texts


def unit_receipt_key(unit: int) -> str:
    """Where the receipt of a unit's tokens stands."""
    return f"receipts/tokens/unit-{unit:06d}.json"


def tokenize_unit(job: CorpusJob, tokenizer: Tokenizer, unit: Unit) -> UnitReceipt:
    """Read, split, encode and pack one unit; write its two shards, its quarantine and, last, its receipt."""
    documents: dict[str, list[str]] = {"train": [], "heldout": []}
    bad: list[BadRecord] = []
    empty = bytes_in = 0
    for record in read_unit(job.corpus, job.source, unit):
        bytes_in += len(record.raw if isinstance(record, BadRecord) else record.text.encode())
        if isinstance(record, BadRecord):
            bad.append(record)
        elif not record.text.strip():
            empty += 1
        else:
            split = "heldout" if is_heldout(record.text, job.corpus.heldout_fraction) else "train"
            documents[split].append(record.text)
    shards = {split: _token_shard(job, tokenizer, unit, split, texts) for split, texts in documents.items()}
    accounting = Accounting(
        bytes_in=bytes_in if isinstance(job.corpus, HubCorpus) else unit.num_bytes,
        documents_in=len(documents["train"]) + len(documents["heldout"]) + empty + len(bad),
        train=len(documents["train"]),
        heldout=len(documents["heldout"]),
        empty=empty,
        quarantined=len(bad),
    )
    receipt = UnitReceipt(
        unit=unit.index, accounting=accounting, **shards, quarantine=_quarantine(job, unit.index, bad)
    )
    job.output.put(job.key(unit_receipt_key(unit.index)), receipt.model_dump_json().encode())
    return receipt


def _token_shard(job: CorpusJob, tokenizer: Tokenizer, unit: Unit, split: str, texts: list[str]) -> ShardInfo:
    encoded = [
        ids
        for start in range(0, len(texts), _ENCODE_AT_ONCE)
        for ids in tokenizer.encode_batch(texts[start : start + _ENCODE_AT_ONCE])
    ]
    rows, counts = wrap(encoded, job.seq_len, tokenizer.eos_id)
    dtype = id_type(tokenizer.vocab_size)
    name = f"tokens/{split}-{unit.index:06d}.arrow"
    data = to_arrow(
        {"ids": rows.astype(dtype), "num_tokens": counts},
        {"split": split, "unit": str(unit.index), "tokenizer_sha256": tokenizer.digest},
    )
    return put_shard(job.output, job.prefix, name, data, unit=unit.index, rows=len(rows), tokens=int(counts.sum()))


def _quarantine(job: CorpusJob, unit: int, bad: list[BadRecord]) -> str | None:
    if not bad:
        return None
    name = f"quarantine/unit-{unit:06d}.jsonl"
    lines = [
        json.dumps(
            {
                "key": record.key,
                "offset": record.offset,
                "reason": record.reason,
                "raw": base64.b64encode(record.raw).decode(),
            }
        )
        for record in bad
    ]
    job.output.put(job.key(name), ("\n".join(lines) + "\n").encode())
    return name


def noise_receipt_key(epoch: int, unit: int) -> str:
    """Where the receipt of a unit's noise stands."""
    return f"receipts/noise/epoch-{epoch:03d}/unit-{unit:06d}.json"


def noise_shard(job: CorpusJob, noise: CorpusNoise, tokens: ShardInfo, first_row: int, epoch: int) -> ShardInfo:
    """Write down the noise of one token shard for one epoch: t [N] and one bit a token, then the receipt."""
    views = map_shard(job.output, job.prefix, tokens)
    x0 = views["ids"].astype(np.int64)
    sample_ids = first_row + np.arange(tokens.rows, dtype=np.int64)
    xt, t = noise.corrupt(epoch, sample_ids, x0)
    data = to_arrow(
        {"t": t, "is_noised": pack_bits(xt, x0)},
        {"epoch": str(epoch), "unit": str(tokens.unit), "tokens_sha256": tokens.sha256},
    )
    name = f"noise/epoch-{epoch:03d}/train-{tokens.unit:06d}.arrow"
    info = put_shard(job.output, job.prefix, name, data, unit=tokens.unit, rows=tokens.rows, tokens=tokens.tokens)
    job.output.put(job.key(noise_receipt_key(epoch, tokens.unit)), info.model_dump_json().encode())
    return info


def finished(job: CorpusJob, receipt_key: str, kind: type[AnyReceipt]) -> AnyReceipt | None:
    """The receipt of a step if it was completed and its files have the promised sizes, else None."""
    key = job.key(receipt_key)
    if not job.output.exists(key):
        return None
    try:
        receipt = kind.model_validate_json(job.output.read(key))
    except ValueError:
        return None
    infos = [receipt] if isinstance(receipt, ShardInfo) else [receipt.train, receipt.heldout]
    return receipt if all(_stands(job, info) for info in infos) else None


def _stands(job: CorpusJob, info: ShardInfo) -> bool:
    found = job.output.stat(job.key(info.key))
    return found is not None and found.size == info.bytes
