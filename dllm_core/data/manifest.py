"""CorpusManifest: what exists, from what, by which tokenizer, with which noise. Written last: where it is, all is.

On disk it is a small tree, so that 60,000 shards load in seconds: `manifest.json`, sealed, names one Arrow table of
shards for each split and noise epoch by its sha256.
"""

import contextlib
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from dllm_core.config.base import Frozen
from dllm_core.config.fingerprint import fingerprint, seal, unseal
from dllm_core.data.packing import AnyPacking
from dllm_core.data.shard import ShardInfo
from dllm_core.data.tokenizer import Tokenizer, TokenizerConfig
from dllm_core.errors import ConfigError, DataError
from dllm_core.model.special_ids import TOKENIZER_NAME
from dllm_core.noise.process import AnyNoise
from dllm_core.storage.store import Store, sha256

FORMAT: Literal[1] = 1
NAME = "manifest.json"
Counts = dict[str, int]
_OF_ROWS = {"tokenizer_sha256", "vocab_size", "packing", "seed", "process", "t_min", "block_length", "steps"}


class Accounting(Frozen):
    """Where every record went: documents_in = train + heldout + filtered + duplicates + quarantined, unit by unit."""

    bytes_in: int = 0
    documents_in: int = 0
    train: int = 0
    heldout: int = 0
    filtered: Counts = Field(default_factory=dict)
    duplicates: Counts = Field(default_factory=dict)
    quarantined: Counts = Field(default_factory=dict)

    def __add__(self, other: "Accounting") -> "Accounting":
        sums: dict[str, Any] = {}
        for name in Accounting.model_fields:
            left, right = getattr(self, name), getattr(other, name)
            if isinstance(left, dict):
                sums[name] = {key: left.get(key, 0) + right.get(key, 0) for key in sorted({*left, *right})}
            else:
                sums[name] = left + right
        return Accounting(**sums)

    @property
    def num_quarantined(self) -> int:
        """Bad records."""
        return sum(self.quarantined.values())

    @property
    def documents_out(self) -> int:
        """Documents that made tokens."""
        return self.train + self.heldout

    @property
    def num_removed(self) -> int:
        """Records that are in the quarantine, for whatever reason."""
        return self.documents_in - self.documents_out

    def check(self, place: str) -> None:
        """Refuse a sum that does not add up: a record was lost or counted twice."""
        removed = sum(sum(counts.values()) for counts in (self.filtered, self.duplicates, self.quarantined))
        if self.documents_out + removed != self.documents_in:
            problem = f"{self.documents_in} records in but {self.documents_out + removed} accounted for"
            raise DataError(place, problem)


class Split(Frozen):
    """Shards of one split, in the order of their units; row ids count through them."""

    shards: tuple[ShardInfo, ...]

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Counted tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)


class CorpusManifest(Frozen):
    """The table of contents of `corpora/<fingerprint>/`."""

    format: Literal[1] = FORMAT
    fingerprint: str
    source: dict[str, Any]
    units: int
    tokenizer: TokenizerConfig
    tokenizer_sha256: str
    tokenizer_engine: str
    vocab_size: int
    packing: AnyPacking
    seed: int
    process: AnyNoise
    t_min: float
    block_length: int | None = None
    steps: int | None = None
    accounting: Accounting
    train: Split
    heldout: Split
    noise_epochs: tuple[tuple[ShardInfo, ...], ...]

    @property
    def rows_digest(self) -> str:
        """What the training rows and their noise are: `rows-` and 12 hex digits. Written noise changes none."""
        identity = self.model_dump(mode="json", include=_OF_ROWS)
        return f"rows-{fingerprint([identity, [[shard.rows, shard.sha256] for shard in self.train.shards]])}"

    def heldout_digest(self, rows: int) -> str:
        """What so many evenly spaced held-out rows are; all of them where there are no more."""
        shards = [[shard.rows, shard.sha256] for shard in self.heldout.shards]
        return fingerprint([shards, min(rows, self.heldout.rows)])

    @property
    def seq_len(self) -> int:
        """Tokens in a row."""
        return self.packing.seq_len


class _Table(Frozen):
    key: str
    sha256: str


def corpus_prefix(fingerprint: str) -> str:
    """The folder of a corpus below the storage root."""
    return f"corpora/{fingerprint}"


def write_manifest(store: Store, manifest: CorpusManifest) -> None:
    """Write the tables of shards, then the manifest that names them."""
    prefix = corpus_prefix(manifest.fingerprint)

    def table(name: str, shards: tuple[ShardInfo, ...]) -> dict[str, Any]:
        sink = pa.BufferOutputStream()
        columns = {field: [getattr(shard, field) for shard in shards] for field in ShardInfo.model_fields}
        arrow = pa.table(columns, schema=_SCHEMA)
        with pa.ipc.new_file(sink, arrow.schema) as writer:
            writer.write_table(arrow)
        data = bytes(sink.getvalue())
        key = f"manifest/{name}-{sha256(data)[:16]}.arrow"  # a new table never replaces one that is in use
        store.put(f"{prefix}/{key}", data)
        return _Table(key=key, sha256=sha256(data)).model_dump()

    values = manifest.model_dump(mode="json", exclude={"train", "heldout", "noise_epochs"})
    values["train"] = table("train", manifest.train.shards)
    values["heldout"] = table("heldout", manifest.heldout.shards)
    values["noise_epochs"] = [table(f"noise-{e:03d}", shards) for e, shards in enumerate(manifest.noise_epochs)]
    store.put(f"{prefix}/{NAME}", seal(values))


def has_manifest(store: Store, fingerprint: str) -> bool:
    """Whether a corpus is finished."""
    return store.exists(f"{corpus_prefix(fingerprint)}/{NAME}")


def read_manifest(store: Store, fingerprint: str) -> CorpusManifest:
    """The manifest of a finished corpus."""
    prefix = corpus_prefix(fingerprint)
    key = f"{prefix}/{NAME}"
    if not store.exists(key):
        raise DataError(f"{store.url}/{key}", "no such corpus", remedy="run `dllm preprocess` first")

    def shards(table: Any) -> tuple[ShardInfo, ...]:
        entry = _Table.checked(table, key)
        data = store.read(f"{prefix}/{entry.key}")
        if sha256(data) != entry.sha256:
            raise ValueError(f"{entry.key} does not match its sha256")
        rows = pa.ipc.open_file(pa.BufferReader(data)).read_all().to_pylist()
        return tuple(ShardInfo.model_construct(**row) for row in rows)

    try:
        values = unseal(store.read(key))
        train, heldout = shards(values.pop("train")), shards(values.pop("heldout"))
        noise = tuple(shards(table) for table in values.pop("noise_epochs"))
        empty: dict[str, Any] = {"train": {"shards": ()}, "heldout": {"shards": ()}, "noise_epochs": ()}
        manifest = CorpusManifest.checked({**values, **empty}, key)
    except (ValueError, KeyError, ConfigError, pa.ArrowException) as error:
        remedy = "run `dllm preprocess repair`"
        raise DataError(f"{store.url}/{key}", f"is damaged ({error})", remedy=remedy) from error
    made = {"train": Split.model_construct(shards=train), "heldout": Split.model_construct(shards=heldout)}
    return manifest.model_copy(update={**made, "noise_epochs": noise})


_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("unit", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("tokens", pa.int64()),
        pa.field("bytes", pa.int64()),
        pa.field("sha256", pa.string()),
    ]
)


def read_tokenizer(store: Store, manifest: CorpusManifest) -> Tokenizer:
    """The tokenizer that made the shards, proven by its digest."""
    key = f"{corpus_prefix(manifest.fingerprint)}/{TOKENIZER_NAME}"
    data = store.read(key)
    if sha256(data) != manifest.tokenizer_sha256:
        raise DataError(
            f"{store.url}/{key}", "is not the tokenizer of the manifest", remedy="run `dllm preprocess repair`"
        )
    return Tokenizer(data.decode("utf-8"), manifest.tokenizer, key)


def tokenizer_digest(store: Store, fingerprint: str) -> str | None:
    """sha256 of the tokenizer that makes a corpus: what its manifest says, or its copy has; None before there is one.

    Reads none of the manifest's tables.
    """
    prefix = corpus_prefix(fingerprint)
    with contextlib.suppress(ValueError, KeyError):  # damaged: the copy may be whole
        if has_manifest(store, fingerprint):
            return str(unseal(store.read(f"{prefix}/{NAME}"))["tokenizer_sha256"])
    key = f"{prefix}/{TOKENIZER_NAME}"
    return sha256(store.read(key)) if store.exists(key) else None


def first_rows(shards: tuple[ShardInfo, ...]) -> list[int]:
    """The row id of each shard's first row."""
    return [0, *np.cumsum([shard.rows for shard in shards]).tolist()][:-1] if shards else []
